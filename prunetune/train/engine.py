"""What differs between engines: who holds what, how it becomes whole, and how it is handed out again.

``Engine`` is the case where every process holds everything (one process, DDP); FSDP's sharded tensors differ from it
in two lines. DeepSpeed is in zero.py. All methods are collective: every process calls them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from prunetune.model.sharded import changing, local, whole
from prunetune.model.surgery import base_model

T = TypeVar("T")


class Engine:
    """One process or DDP.

    Args:
        trainer: the trainer whose model, optimizer and accelerator it looks after.
    """

    # Whether adapters, or their float32 values, are kept elsewhere than in the model.
    shards_trained = False
    # Whether it takes the optimizer's step itself, before the Trainer's callbacks could come in between.
    steps_in_backward = False
    # Whether the base's weights are whole only while a forward or backward pass needs them.
    shards_weights = False

    def __init__(self, trainer: Any):
        self.trainer = trainer

    @property
    def runs(self) -> bool:
        """Whether the model is in the engine's hands now."""
        return True

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, as the engine holds them."""
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def values(self) -> dict[str, Tensor]:
        """The trained parameters, whole, on the CPU."""
        return {name: whole(parameter.detach()).cpu() for name, parameter in self.trained().items()}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizer keeps for every trained parameter, whole, on the CPU."""
        state = self.trainer.optimizer.state
        return {
            name: {key: whole(value).cpu() for key, value in state[parameter].items() if isinstance(value, Tensor)}
            for name, parameter in self.trained().items()
            if parameter in state
        }

    def adam_pieces(self) -> Iterator[tuple[Mapping[str, Tensor], float]]:
        """(what Adam keeps, its beta2) for the trained numbers of this process, each of them on one process only."""
        kept = self.trainer.optimizer.state
        for group in self.trainer.optimizer.param_groups:
            for parameter in group["params"]:
                if state := kept.get(parameter):
                    tensors = {key: local(value) for key, value in state.items() if isinstance(value, Tensor)}
                    yield tensors, group["betas"][1]

    def opened(self, parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[list[Tensor]]:
        """Trained parameters, whole and in the precision that they are kept in, to be changed in place."""
        return changing(parameters)

    def before_step(self, function: Callable[[], None], *, gradients: bool) -> None:
        """With ``steps_in_backward``: lets a function run before every step from now on; otherwise callbacks do.

        Args:
            function: all processes call it.
            gradients: whether it reads the trained parameters with their gradients, or takes all of these away, which
                leaves the parameters alone in that step.
        """

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's param groups that have parameters, in the order they were made in."""
        return [group for group in self.trainer.optimizer.param_groups if group["params"]]

    def load(self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Gives the optimizer what it kept; ``values`` are the trained parameters, which are in the model already."""
        optimizer, trained = self.trainer.optimizer, self.trained()
        names = {id(parameter): name for name, parameter in trained.items()}
        state, groups, number = {}, [], 0
        for group in optimizer.param_groups:
            indices = []
            for parameter in group["params"]:
                kept = moments.get(names[id(parameter)], {})
                if kept:
                    state[number] = {key: alike(value, parameter) for key, value in kept.items()}
                indices.append(number)
                number += 1
            groups.append({**group, "params": indices})
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def inside(self, function: Callable[[], T]) -> T:
        """Calls a function that runs parts of the model, where the engine finds whole weights for them."""
        return function()

    def release(self) -> None:
        """Ends the engine: adapters are plain tensors of the model again, and no hook of the engine is left."""


def in_forward(model: Any, function: Callable[[], T]) -> T:
    """Calls a function in place of a causal LM's forward pass, with every hook around it that gathers weights.

    Args:
        model: as the engine holds it: the causal LM or a PeftModel of one. function: all processes call alike ones.
    """
    causal, found = base_model(model), []
    own = vars(causal).get("forward")

    def forward(*args: Any, **kwargs: Any) -> None:
        found.append(function())

    causal.forward = forward
    try:
        model()
    finally:
        del causal.forward
        if own is not None:
            causal.forward = own
    return found[0]


def alike(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, spread over processes as the parameter is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
