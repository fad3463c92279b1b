"""A plain copy of a model whose weights are spread over processes, for what one process does alone: the export."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.integrations import deepspeed as integration

from prunetune.model.sharded import is_spread, opened, whole
from prunetune.model.surgery import base_model


def whole_copy(model: Any, *, wanted: bool) -> Any:
    """A plain model in main memory, equal to a spread one and gathered weight by weight; None where not wanted.

    Args:
        model: a causal LM of transformers or a PeftModel of one, adapters spread or not.
        wanted: whether this process gets the copy; all take part.
    """
    with loading_whole():
        copied = _empty_like(model) if wanted else None
    for path, module in model.named_modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            with opened(module) if is_spread(value) else contextlib.nullcontext():
                content = whole(value.detach())
                if copied is not None:
                    _put(copied.get_submodule(path), name, value, content)
    if copied is not None:
        base_model(copied).tie_weights()
        copied.eval()
    return copied


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Lets one process load models by itself: else transformers would spread them over all, under ZeRO-3."""
    known = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = known


def _empty_like(model: Any) -> Any:
    base = base_model(model)
    with torch.device("meta"):
        empty = type(base)(base.config)
        empty.generation_config = base.generation_config
        if isinstance(model, PeftModel):
            empty = get_peft_model(empty, copy.deepcopy(model.active_peft_config))
    return empty


def _put(module: nn.Module, name: str, value: Tensor, content: Tensor) -> None:
    content = content.to("cpu", copy=True)
    if isinstance(value, nn.Parameter):
        setattr(module, name, nn.Parameter(content, requires_grad=value.requires_grad))
    else:
        module._buffers[name] = content
