"""Methods that rank rows by one number: direction, limits at both ends, and who can be judged. Legend: N rows."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from prunetune.core.streams import stream
from prunetune.methods.options import MethodOptions
from prunetune.methods.ranking import best_first, name_ranks, percentiles
from prunetune.methods.samples import SampleChoice, SampleMethod, keep_highest
from prunetune.model.score_table import ScoreTable

Prefer = Literal["low", "middle", "high"]
# exp(20) is a perplexity of 485 million: beyond it a row is hopeless, and float32 is not far from overflowing.
LARGEST_NLL = 20.0


class LimitOptions(MethodOptions):
    """Limits at both ends of the ranking."""

    lower: float = Field(0.0, ge=0, lt=1, description="this share with the smallest values is left out")
    upper: float = Field(1.0, gt=0, le=1, description="what lies above this share is left out")

    @model_validator(mode="after")
    def _ordered(self) -> LimitOptions:
        if self.lower >= self.upper:
            raise ValueError(f"lower = {self.lower} leaves nothing below upper = {self.upper}; set lower below upper")
        return self


class RankedSamples(SampleMethod):
    """A method that ranks rows by one number and may leave out both ends of the ranking."""

    @abstractmethod
    def values(self, table: ScoreTable) -> np.ndarray:
        """(N,) float64, the number itself, whichever way is preferred; NaN where a row has none."""

    @abstractmethod
    def prefer(self) -> Prefer:
        """Which end, or the middle between the limits, is kept first."""

    def limits(self) -> tuple[float, float]:
        """The shares of the ranking, from the smallest value, between which a row may be kept at all."""
        return 0.0, 1.0

    def shown(self, values: np.ndarray) -> np.ndarray:
        """(N,) what the audit says instead of ``values``: must rise with them."""
        return values

    def scores(self, table: ScoreTable) -> np.ndarray:
        values = np.where(table.targets > 0, self.values(table), np.nan)
        if self.prefer() == "middle":
            return -np.abs(percentiles(values) - sum(self.limits()) / 2)
        return values if self.prefer() == "high" else -values

    def choose(self, table: ScoreTable, count: int) -> SampleChoice:
        table.require(self.needs, type(self).__name__)
        values = np.where(table.targets > 0, self.values(table), np.nan)
        choice = keep_highest(table, self.scores(table), count, within(table, values, *self.limits()))
        border = choice.threshold
        if border is not None:
            signed = np.array([border if self.prefer() == "high" else -border])
            border = None if self.prefer() == "middle" else float(self.shown(signed)[0])
        return replace(choice, value=self.shown(values), threshold=border)


def within(table: ScoreTable, values: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """(N,) bool, the rows between two shares of the ranking from the smallest value; none whose value is not finite."""
    order = ascending(table, values)
    # Rounded first: 0.57 * 100 is 56.99999999999999.
    first, last = math.floor(round(lower * len(order), 9)), math.ceil(round(upper * len(order), 9))
    found = np.zeros(len(table), dtype=bool)
    found[order[first:last]] = True
    return found


def ascending(table: ScoreTable, values: np.ndarray) -> np.ndarray:
    """Numbers of the rows with a finite value, from the smallest value to the largest, equal ones by id."""
    rows = np.flatnonzero(np.isfinite(values))
    return rows[best_first(-values[rows], name_ranks(table.ids)[rows])]


def perplexity(nll: np.ndarray) -> np.ndarray:
    """exp of mean negative log-likelihoods in nats, at most exp(20); what is not finite stays."""
    return np.where(np.isfinite(nll), np.exp(np.minimum(nll, LARGEST_NLL)), nll)


def lots(table: ScoreTable, seed: int, purpose: str) -> np.ndarray:
    """(N,) float64 in [0, 1), a lot for every row that depends on the seed, the purpose and the row's id alone."""
    return np.array([stream(seed, purpose, name).random() for name in table.ids], dtype=np.float64)
