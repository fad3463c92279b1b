"""Adapters that survive losing most of their delta: a pull of every change toward zero, and dropping on the way.

The pull is AdamR's (arXiv 2410.09344): decoupled from the gradient, applied once an optimizer step and scaled by the
size of Adam's second moments. So micro-batches, world size and resumption change nothing. What is dropped in the end is
decided elsewhere. Legend: m x n the delta, r LoRA rank, k rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from prunetune.config.presets import phase_steps
from prunetune.config.schema import DeltaConfig
from prunetune.core.errors import Problem
from prunetune.core.streams import lattice
from prunetune.model.deltas import BLOCK_BYTES, threshold
from prunetune.model.surgery import base_model
from prunetune.train.compat import raise_if_any
from prunetune.train.launched import engine_problems
from prunetune.train.trainer import JointTrainer

_ADAM = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Factors:
    """One adapter's factors, delta = scale * b @ a: parameters ``a`` (r, n) and ``b`` (m, r)."""

    name: str
    a: Tensor
    b: Tensor
    scale: float


def trained_factors(model: nn.Module) -> Iterator[Factors]:
    """The factors of every trainable adapter in a PeftModel, embeddings' included."""
    for name, module in base_model(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, scale in module.scaling.items():
            if adapter in module.lora_A:
                a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            elif adapter in module.lora_embedding_A:
                a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
            else:
                continue
            if a.requires_grad:
                yield Factors(name, a, b, scale)


@torch.no_grad()
def pull(factors: Factors, kind: Literal["l2", "l1"], rate: Tensor | float, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """Moves both factors down the exact gradient of a penalty on their product.

    l2: half of |sBA|_F^2, through r x r products alone. l1: the sum of |sBA|_ij, one block of rows at a time.

    Args:
        factors: changed in place.
        kind: the penalty. rate: length of the step; never more than Polyak's, penalty / |gradient|^2, so that no step
            goes far past zero.
        block_bytes: of a block of the product (l1).

    Returns:
        |sBA|_F^2 before the step, without waiting for the device.
    """
    a, b, s = factors.a, factors.b, factors.scale
    gram_a, gram_b = a @ a.T, b.T @ b
    squared = s**2 * (gram_a * gram_b).sum()
    if kind == "l2":
        penalty, to_a, to_b = squared / 2, s**2 * (gram_b @ a), s**2 * (b @ gram_a)
    else:
        penalty, to_a, to_b = squared.new_zeros(()), torch.zeros_like(a), torch.empty_like(b)
        step = max(1, block_bytes // (4 * a.shape[1]))
        for start in range(0, b.shape[0], step):
            rows_kr = b[start : start + step]
            product_kn = s * (rows_kr @ a)
            sign_kn = s * product_kn.sign()
            penalty += product_kn.abs().sum()
            to_a += rows_kr.T @ sign_kn
            to_b[start : start + step] = sign_kn @ a.T
    limit = penalty / (to_a.square().sum() + to_b.square().sum()).clamp_min(1e-30)
    rate = torch.minimum(torch.as_tensor(rate, device=a.device, dtype=a.dtype), limit)
    a -= rate * to_a
    b -= rate * to_b
    return squared


def adam_scale(trainer: Any) -> Tensor:
    """Root of the mean of all bias-corrected second moments (AdamR's one global scalar); a collective call."""
    total = torch.zeros((), device=trainer.args.device)
    for state, beta2 in trainer.engine.adam_pieces():
        moment = state["exp_avg_sq"]
        total += moment.sum() / (1 - beta2 ** state["step"].to(moment.device))
    if trainer.engine.shards_trained:
        total = trainer.accelerator.reduce(total, "sum")
    count = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.engine.trained().values())
    return (total / count).sqrt()


class TrainDrop:
    """Drops input channels or entries of every A by lot and divides what stays by its chance, anew in every step.

    Args:
        model: the PeftModel. config: the section. seed: of the run.
    """

    def __init__(self, model: nn.Module, config: DeltaConfig, seed: int):
        self._config, self._seed = config, seed
        self._share, self._step = 0.0, -1
        self._masks: dict[str, Tensor] = {}
        modules = {factors.name: base_model(model).get_submodule(factors.name) for factors in trained_factors(model)}
        linears = [
            (f"{name}.{adapter}", a)
            for name, module in modules.items()
            for adapter, a in getattr(module, "lora_A", {}).items()
        ]
        by_columns = config.train_drop_unit == "columns"
        self._handles: list[Any] = [
            a.register_forward_pre_hook(self._on_inputs(name))
            if by_columns
            else _Redirected(a, self._on_entries(name, a))
            for name, a in linears
        ]

    def begin_step(self, step: int, share: float) -> None:
        """Draws anew for optimizer step ``step``; ``share`` of A is dropped."""
        self._step, self._share = step, share
        self._masks.clear()

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _mask(self, name: str, rows: int, like: Tensor) -> Tensor:
        """(rows, n): 0 or 1 / (1 - share)."""
        if name not in self._masks:
            purpose = ("train drop", name, self._step)
            words = lattice(self._seed, *purpose, rows=slice(0, rows), columns=like.shape[-1])
            stays = torch.from_numpy(words.astype("int64")) < threshold(1 - self._share)
            self._masks[name] = (stays / (1 - self._share)).to(like.device)
        return self._masks[name].to(like.dtype)

    def _on_inputs(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not module.training or not self._share:
                return None
            return (args[0] * self._mask(name, 1, args[0])[0], *args[1:])

        return hook

    def _on_entries(self, name: str, module: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            weight = module.weight
            if module.training and self._share:
                weight = weight * self._mask(name, weight.shape[0], weight)
            return functional.linear(x, weight)

        return forward


class _Redirected:
    """Another function in place of a module's forward, between the hooks with which engines make its weight whole."""

    def __init__(self, module: nn.Module, forward: Any):
        self._module = module
        vars(module)["forward"] = forward

    def remove(self) -> None:
        """Puts the module's own back."""
        vars(self._module).pop("forward", None)


class DeltaTrainer(JointTrainer):
    """JointTrainer that makes adapters ready for losing most of their delta, as ``prune.delta`` says.

    Raises:
        ConfigError: an optimizer or engine that the pull toward zero cannot follow.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        delta = self.prune.delta if self.prune is not None else None
        if delta is None:
            return
        raise_if_any(list(self._delta_problems(delta)))
        if delta.regularize != "none":
            self.add_callback(_Pull(self, delta))
        if delta.train_drop:
            self.add_callback(_Drop(self, delta))

    def _delta_problems(self, delta: DeltaConfig) -> Iterator[Problem]:
        if not delta.keeps_all:
            yield from engine_problems(self, "dropping a part of what was learnt", "delta")
        if delta.regularize == "none":
            return
        if self.args.optim not in _ADAM:
            why = f"its strength follows Adam's second moments, and optim is {self.args.optim!s}; set optim=adamw_torch"
            yield Problem(why, "delta.regularize")
        yield from engine_problems(self, "penalty on what is learnt", "delta.regularize")


class _Pull(TrainerCallback):
    """The decoupled step of the penalty, after Adam's."""

    def __init__(self, trainer: DeltaTrainer, config: DeltaConfig):
        self._trainer, self._config = trainer, config

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, kind = self._trainer, self._config.regularize
        if trainer.accelerator.optimizer_step_was_skipped or kind == "none":
            return
        size = adam_scale(trainer)
        rate = trainer.engine.groups()[0]["lr"] * self._config.strength / torch.where(size == 0, 1.0, size)
        squares = []
        for factors in trained_factors(trainer.model):
            with trainer.engine.opened([factors.a, factors.b]) as (a, b):
                squares.append(pull(replace(factors, a=a, b=b), kind, rate))
        trainer._metrics["train"]["delta_norm"].append(float(torch.stack(squares).sum().sqrt()))


class _Drop(TrainerCallback):
    """More and more of A is dropped over the first half of the recover phase; from then on all of ``train_drop``."""

    def __init__(self, trainer: DeltaTrainer, config: DeltaConfig):
        self._trainer, self._config = trainer, config
        self._dropping: TrainDrop | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)
        if self._trainer.plan is not None and self._trainer.prune is not None:
            self._dropping = TrainDrop(self._trainer.model, self._config, self._trainer.prune.seed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._dropping is None or self._trainer.prune is None:
            return
        phases = phase_steps(self._trainer.prune.phases, state.max_steps)
        ramp = min(1.0, (state.global_step - phases.freeze + 1) / max(1, phases.recover // 2))
        self._dropping.begin_step(state.global_step, self._config.train_drop * ramp)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._dropping is not None:
            self._dropping.detach()
            self._dropping = None
