"""torch's FSDP2: ending it. Its spread tensors gather themselves (engine.py), but torch has no way back from it.

What is private in torch here is checked by the tests of this engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from prunetune.model.sharded import whole
from prunetune.train.engine import Engine, T, in_forward


class Fsdp2(Engine):
    """FSDP2 through accelerate. At the freeze every process holds the model whole until the next engine spreads it."""

    shards_trained = shards_weights = True

    @property
    def runs(self) -> bool:
        return any(isinstance(module, FSDPModule) for module in self.trainer.model.modules())

    def inside(self, function: Callable[[], T]) -> T:
        return in_forward(self.trainer.model, function)

    def release(self) -> None:
        trainer = self.trainer
        if not self.runs:
            return
        trainer.accelerator.free_memory()
        undo_fully_shard(trainer.model)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.model_wrapped = trainer.model


def undo_fully_shard(model: nn.Module) -> None:
    """Makes a model whole and plain again: no spread tensor, no hook, its own classes. Collective.

    Args:
        model: with ``fully_shard`` on it and any of its modules; changed in place.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                value = whole(parameter.detach())
                setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for module in model.modules():
        kinds = (module._state_dict_pre_hooks, module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks)
        for hooks in kinds:
            for number in [number for number, hook in hooks.items() if _is_fsdps(hook)]:
                del hooks[number]
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                handle.remove()
            for key in (STATE_KEY, REGISTRY_KEY):
                vars(module).pop(key, None)
            _module_state_mapping.pop(module, None)
            module.__class__ = type(module).__bases__[1]


def _is_fsdps(hook: Any) -> bool:
    inner = getattr(hook, "hook", hook)  # torch wraps some
    return str(getattr(inner, "__module__", "")).startswith("torch.distributed.fsdp")
