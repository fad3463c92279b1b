"""What differs between engines: who holds what, how it becomes whole, and how it is handed out again.

``Engine`` is the case where every process holds everything (one process, DDP); FSDP's sharded tensors differ from it
in two lines. DeepSpeed is in zero.py. All methods are collective: every process calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Engine:
    """One process or DDP.

    Args:
        trainer: the trainer whose model, optimizer and accelerator it looks after.
    """

    # Whether adapters, or their float32 values, are kept elsewhere than in the model.
    shards_trained = False

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

    def release(self) -> None:
        """Ends the engine: adapters are plain tensors of the model again, and no hook of the engine is left."""


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alike(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, spread over processes as the parameter is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
