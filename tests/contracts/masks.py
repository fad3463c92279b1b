"""What the contract tests of masks need: a context, any registered mask with its least options, made-up statistics."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from prunetune.config.presets import PhaseSteps
from prunetune.config.schema import TargetConfig
from prunetune.methods.masks import MASKS, Mask, MaskContext, build_mask
from prunetune.model.adapters import AdapterView
from prunetune.model.budget import plan_shape
from prunetune.model.gates import GateStatistics
from prunetune.model.planner import Planner
from tests.support import tiny_arch, tiny_model

PHASES = PhaseSteps(warmup_end=3, freeze=15, total=20)
ALL_KINDS = ("mlp_channels", "kv_groups", "query_heads", "layers")


def context(units: tuple[str, ...] = ("mlp_channels", "kv_groups"), phases: PhaseSteps = PHASES, seed: int = 0,
            kept: str = "50%", model_type: str = "llama") -> MaskContext:  # fmt: skip
    """A mask's context for a tiny model."""
    planner = Planner(tiny_arch(model_type), TargetConfig(kept=kept, units=units, align=8))
    return MaskContext(planner, phases, seed)


def options_of(name: str, folder: Any, of: MaskContext) -> dict[str, Any]:
    """The least options that a mask needs; a mask with an option that has no default must be listed here."""
    required = [key for key, field in MASKS.get(name).Options.model_fields.items() if field.is_required()]
    if required == ["plan"]:
        scores = {site.name: np.arange(site.size, dtype=float) for site in of.planner.sites}
        of.planner.plan(scores).save(folder / "plan.json")
        return {"plan": folder / "plan.json"}
    assert required == [], f"add what {name!r} needs for its options {required} here"
    return {}


def make(name: str, folder: Any, of: MaskContext | None = None, **options: Any) -> Mask:
    """A fresh mask."""
    of = of or context()
    if MASKS.get(name).reads_adapters:
        of = with_adapters(of)
    return build_mask(name, {**options_of(name, folder, of), **options}, of)


def with_adapters(of: MaskContext) -> MaskContext:
    """The context with a tiny model's adapters to read; the same ones every time."""
    arch = of.planner.arch
    model = copy.deepcopy(_adapted_model(arch.model_type))
    return replace(of, adapters=AdapterView(model, arch, of.planner.sites))


@functools.cache
def _adapted_model(model_type: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(tiny_model(model_type), config)


def set_gradients(mask: Mask, generator: torch.Generator, scale: float) -> None:
    """Random gradients of all adapters, as a backward pass would leave them."""
    for linear in mask.context.adapters.linears if mask.context.adapters else ():
        for factor in linear.factors()[:2]:
            factor.grad = scale * torch.randn(factor.shape, generator=generator)


def statistics(mask: Mask, seed: int, scale: float = 1.0) -> GateStatistics:
    """Random gate gradients, squares if the mask asks for them, and gradients of the adapters if it reads them."""
    generator = torch.Generator().manual_seed(seed)
    set_gradients(mask, generator, scale)
    grad = {site.name: scale * torch.randn(site.size, generator=generator) for site in mask.sites}
    square = {name: values.square() for name, values in grad.items()} if mask.record_squares else {}
    return GateStatistics(grad, square)


def run(mask: Mask, first: int, last: int) -> list[dict[str, Tensor]]:
    """Steps first .. last - 1 on made-up statistics; returns the gates of each.

    Where shapes are to be tried, the one with the worst score wins: not the one that the mask takes by itself.
    """
    history = []
    for step in range(first, last):
        plans = mask.trial(step)
        if len(plans) > 1:
            mask.settle(plan_shape(mask.context.planner.arch, plans[-1]))
        history.append({name: gate.clone() for name, gate in mask.gates(step).items()})
        mask.after_backward(step, statistics(mask, step))
        mask.after_step(step, 1e-3)
    return history
