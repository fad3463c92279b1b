"""DeepSpeed ZeRO: gathering, handing out again and ending its engine. Imports deepspeed only when one runs.

Stages 1 and 2 spread the optimizer, stage 3 the weights as well. Under both the optimizer works on flat float32
pieces; DeepSpeed says which part of them belongs to which parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.model.sharded import close, gathered, is_open
from prunetune.train.engine import Engine, T, in_forward

# What stage 3 leaves on modules; the next engine would go on using it, and with it the former one.
_OLD_ENGINES = ("pre_bwd_fn", "post_bwd_fn")


class Zero(Engine):
    """DeepSpeed with ZeRO stage 1 or 2."""

    shards_trained = steps_in_backward = True

    @property
    def runs(self) -> bool:
        return self.trainer.deepspeed is not None

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer; None while no engine runs."""
        engine = self.trainer.deepspeed
        optimizer = None if engine is None else engine.optimizer
        return optimizer if hasattr(optimizer, "optimizer") else None

    def values(self) -> dict[str, Tensor]:
        if self._zero is None:
            return super().values()
        from deepspeed.utils import safe_get_full_fp32_param as full

        return {name: full(parameter).cpu() for name, parameter in self.trained().items()}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state as full

        kept: dict[str, Any] = next(iter(self._zero.optimizer.state.values()), {})
        tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
        scalars = {key: value.cpu() for key, value in tensors.items() if value.dim() == 0}
        return {
            name: {key: full(parameter, key).cpu() for key in sorted(tensors.keys() - scalars.keys())}
            | {key: value.clone() for key, value in scalars.items()}
            for name, parameter in self.trained().items()
        }

    def adam_pieces(self) -> Iterator[tuple[Mapping[str, Tensor], float]]:
        [beta2] = {group["betas"][1] for group in self.groups()}
        for flat in self._flat_pieces():
            yield self._zero.optimizer.state[flat], beta2

    @contextlib.contextmanager
    def opened(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param as full

        values = [full(parameter) for parameter in parameters]
        yield values
        for parameter, value in zip(parameters, values, strict=True):
            self._put(parameter, value, None)
            self._show(parameter, value)

    def before_step(self, function: Callable[[], None], *, gradients: bool) -> None:
        if not self.runs:
            return
        plain = self.trainer.deepspeed.step

        def step(*args: Any, **kwargs: Any) -> None:
            alone = gradients and self._among_gradients(function)
            if not gradients:
                function()
            with self._left_alone() if alone else contextlib.nullcontext():
                plain(*args, **kwargs)

        self.trainer.deepspeed.step = step

    def _among_gradients(self, function: Callable[[], None]) -> bool:
        """Calls a function that finds whole, clipped gradients on whole parameters; whether it took them away."""
        from deepspeed.utils import safe_get_full_grad as full

        trained = list(self.trained().values())
        found = [full(parameter) for parameter in trained]
        clip, norm = self.trainer.deepspeed.gradient_clipping(), torch.nn.utils.get_total_norm(found)
        share = (clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else 1.0
        with gathered(trained):
            for parameter, gradient in zip(trained, found, strict=True):
                parameter.grad = (gradient * share).to(parameter.dtype)
            function()
            left = [parameter.grad is not None for parameter in trained]
            for parameter in trained:
                parameter.grad = None
        # The optimizer has one count of steps for all; mask_refusals sees to it.
        assert all(left) or not any(left)
        return not any(left)

    @contextlib.contextmanager
    def _left_alone(self) -> Iterator[None]:
        """Undoes what a step does to the trained parameters and to what the optimizer keeps of them."""
        state = self._zero.optimizer.state
        before = [
            (flat, flat.detach().clone(), {key: value.clone() for key, value in state.get(flat, {}).items()})
            for flat in self._flat_pieces()
        ]
        yield
        for flat, values, kept in before:
            flat.data.copy_(values)
            for key, value in state.get(flat, {}).items():
                # What the very first step makes is 0 before it.
                value.copy_(kept[key]) if key in kept else value.zero_()
        for parameter, value in zip(self.trained().values(), self.values().values(), strict=True):
            self._show(parameter, value.to(parameter.device))

    def _show(self, parameter: Any, value: Tensor) -> None:
        """Gives the model a value that the optimizer has already."""
        parameter.data.copy_(value)

    def groups(self) -> list[dict[str, Any]]:
        # DeepSpeed left the empty ones out, and in stage 3 takes the parameters away between steps.
        groups: list[dict[str, Any]] = self._zero.optimizer.param_groups
        return groups

    def load(self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        inner = self._zero.optimizer
        kept = next(iter(moments.values()), {})
        for flat in self._flat_pieces():
            scalar = {key: value.to(flat.device) for key, value in kept.items() if value.dim() == 0}
            inner.state[flat] = scalar | {key: torch.zeros_like(flat) for key in kept.keys() - scalar.keys()}
        self._link()
        for name, parameter in self.trained().items():
            self._put(parameter, values[name], None)
            for key, value in moments.get(name, {}).items():
                if value.dim():
                    self._put(parameter, value, key)

    def _flat_pieces(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _link(self) -> None:
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _put(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """This process's part of a whole tensor: of the float32 value (no key) or of a moment."""
        parameter.set_full_hp_param(value.to(parameter.device), key)

    def release(self) -> None:
        trainer = self.trainer
        if not self.runs:
            return
        values, trained = self.values(), self.trained()
        trainer.accelerator.free_memory()
        for name, parameter in trained.items():
            path, _, attribute = name.rpartition(".")
            value = values[name].to(parameter.device, parameter.dtype)
            # A new tensor, because the old one carries the engine's hooks and lies in its flat buffers.
            setattr(trainer.model.get_submodule(path), attribute, nn.Parameter(value))
        trainer.deepspeed = trainer.optimizer = trainer.lr_scheduler = None
        trainer.model_wrapped = trainer.model


class ZeroThree(Zero):
    """DeepSpeed with ZeRO stage 3: of the base weights every process holds a part, too."""

    shards_weights = True

    def _flat_pieces(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _link(self) -> None:
        """Nothing: here the state itself is read."""

    def _put(self, parameter: Any, value: Tensor, key: str | None) -> None:
        self._zero.set_local_hp_param(self._part(parameter, value), parameter, key)

    def _show(self, parameter: Any, value: Tensor) -> None:
        parameter.ds_tensor.data.copy_(self._part(parameter, value))
        if is_open(parameter):  # small ones are kept whole, too
            parameter.data.copy_(value)

    def _part(self, parameter: Any, value: Tensor) -> Tensor:
        """What this process holds of a whole tensor."""
        rank, size = self.trainer.accelerator.process_index, parameter.partition_numel()
        padded = value.new_zeros(size * self.trainer.accelerator.num_processes)
        padded[: value.numel()] = value.flatten()
        return padded[rank * size : (rank + 1) * size].to(parameter.device)

    def inside(self, function: Callable[[], T]) -> T:
        return in_forward(self.trainer.model, function)

    def release(self) -> None:
        super().release()
        for module in self.trainer.model.modules():
            for function in _OLD_ENGINES:
                vars(module).pop(function, None)
        base: list[Any] = [p for p in self.trainer.model.parameters() if hasattr(p, "ds_persist")]
        for parameter in base:
            parameter.ds_persist = False  # the engine kept small weights whole
        close(base)
