"""Compensation: what the weights that stay do about the ones that leave, at the freeze. One file, one method.

Exactness never depends on it: the sliced model equals the masked one before compensation is applied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from prunetune.core.errors import ConfigError, Problem
from prunetune.core.registry import Registry
from prunetune.methods.options import MethodOptions, parse_options, problems_of


class Compensation(ABC):
    """Changes the weight of a linear that loses inputs, one linear at a time.

    Args:
        options: the method's own options.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = "x x^T of the linears' inputs"
    cost: ClassVar[str] = "forward passes; solves one system per linear"
    tokens: int = 0
    # Adds a bias to the linear, which not every config can say; only where a folder is written from the base's shards.
    makes_bias: ClassVar[bool] = False

    def __init__(self, options: MethodOptions):
        self.options = options

    @abstractmethod
    def weight(self, weight: Tensor, kept: Tensor, moment: Tensor | None) -> Tensor:
        """The new weight of a linear on the inputs that stay.

        Args:
            weight: (out, in) float32 effective dense weight (base + adapters).
            kept: (kept,) indices of the inputs that stay.
            moment: (in, in) float32 sum of x x^T over calibration tokens; None if ``tokens`` is 0.

        Returns:
            (out, kept) float32.
        """

    def bias(self, weight: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
        """(out,) float32 that is added to the linear's bias, if ``makes_bias``.

        Args:
            weight: (out, in) float32 dense weight. kept: (kept,) indices of the inputs that stay.
            mean: (in,) float32 mean of the dense inputs over calibration tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} says makes_bias and makes none")


COMPENSATIONS: Registry[type[Compensation]] = Registry("compensation", "prunetune.methods.compensation")


def build_compensation(method: str, options: Mapping[str, Any], *, one_shot: bool = False) -> Compensation:
    """The compensation called ``method``.

    Args:
        one_shot: a folder is written from the base's shards, so linears can get a bias that they did not have.

    Raises:
        ConfigError: unknown names, options and values; one that makes biases in a run that trains.
    """
    kind = COMPENSATIONS.get(method)
    if kind.makes_bias and not one_shot:
        message = f"{method} gives linears a bias, which only `prunetune prune` can; set refit or mask_tuning"
        raise ConfigError([Problem(message, "compensation.method")])
    return kind(parse_options("compensation", method, kind.Options, options))


def check_compensation(method: str, options: Mapping[str, Any], *, one_shot: bool = False) -> list[Problem]:
    """The problems that ``build_compensation`` would raise."""
    return problems_of(lambda: build_compensation(method, options, one_shot=one_shot))
