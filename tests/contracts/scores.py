"""A tiny model with everything that a score may look at: what the score contract and the formula tests share."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from prunetune.methods.scores import LayerFacts, LayerScore, ModelFacts, ModelScore, Score, ScoreContext, build_score
from prunetune.model.architecture import Architecture, describe
from prunetune.model.layer_statistics import CONSUMERS
from prunetune.model.layer_stream import LayerStream, Weights
from prunetune.model.output_judge import OutputJudge
from prunetune.model.sequential import Calibration, batches_of
from prunetune.model.shards import ShardReader
from prunetune.model.token_rows import TokenRow
from prunetune.model.units import sites
from tests.support import tiny_model

_FOLDER = tempfile.TemporaryDirectory()


@dataclass(frozen=True)
class World:
    """A model, its rows, and its statistics."""

    model: Any
    arch: Architecture
    rows: tuple[TokenRow, ...]
    calibration: Calibration

    def weights(self, layer: int) -> dict[str, Tensor]:
        family = self.arch.family
        return {
            role: self.model.get_submodule(f"{family.layers}.{layer}.{module}").weight.detach()
            for role, module in family.modules.items()
        }


def random_rows(number: int, seed: int = 0) -> tuple[TokenRow, ...]:
    """Rows of different lengths whose first three tokens are no targets."""
    draw = np.random.default_rng(seed)
    ids = [draw.integers(5, 99, int(draw.integers(8, 14))).tolist() for _ in range(number)]
    return tuple(TokenRow(row, [-100] * 3 + row[3:]) for row in ids)


@functools.cache
def world(model_type: str = "llama") -> World:
    """One for each architecture, made once."""
    model = tiny_model(model_type, seed=3)
    folder = Path(_FOLDER.name) / model_type
    model.save_pretrained(folder / "model")
    arch, rows = describe(model.config), random_rows(10)
    calibration = Calibration(folder / "calibration", arch, {"of": model_type})
    weights = Weights(ShardReader(folder / "model"))
    config = AutoConfig.from_pretrained(folder / "model")

    def make() -> LayerStream:
        return LayerStream(config, weights, torch.device("cpu"), torch.float32)

    calibration.run(make, batches_of([row.input_ids for row in rows], 64), products=CONSUMERS)
    return World(model, arch, rows, calibration)


def judge(of: World, kinds: Iterable[str]) -> OutputJudge:
    held_out = batches_of([row.input_ids for row in random_rows(4, seed=9)], 64)
    return OutputJudge(of.model, sites(of.arch, kinds), held_out)


def collected(
    name: str, kinds: Iterable[str], of: World | None = None, options: Mapping[str, Any] | None = None, seed: int = 0
) -> Score:
    """The score called ``name``, after it has seen the model."""
    of, kinds = of or world(), tuple(kinds)
    score = build_score(name, options or {}, ScoreContext(of.arch, sites(of.arch, kinds), seed))
    if isinstance(score, ModelScore):
        of.model.requires_grad_(False)

        def price(scores: Mapping[str, Tensor]) -> float:
            return float(sum(values.sum() for values in scores.values()))

        score.collect(ModelFacts(of.model, lambda number: of.rows[number:], lambda: judge(of, kinds), price))
        return score
    assert isinstance(score, LayerScore)
    for layer in range(of.arch.layers):
        score.collect(LayerFacts(layer, of.weights(layer), of.calibration.statistics(layer)))
    return score
