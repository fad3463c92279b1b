"""Weights that are spread over processes (DeepSpeed's ZeRO-3): whole for a moment, one module at a time.

Everything here is collective, and does nothing to weights that are whole. The parameters themselves know how they are
gathered, so nothing of DeepSpeed is imported. FSDP2's spread tensors are whole whenever its own hooks say so; apart
from that ``whole`` makes a whole copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Makes parameters whole, to be changed in place by all processes alike.
Changing = Callable[[Sequence[Tensor]], contextlib.AbstractContextManager[list[Tensor]]]


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the model's weights are spread over processes."""
    return any(map(is_spread, model.parameters()))


def has_parts(model: nn.Module) -> bool:
    """Whether some of the model's weights are spread over processes, by ZeRO-3 or FSDP2."""
    return any(is_spread(parameter) or isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 may have spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: Any) -> torch.Size:
    """The shape that a parameter has when it is whole."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP2 may have spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def changing(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that FSDP2 may have spread, whole, to be changed in place by all processes alike."""
    values = [whole(parameter.detach()) for parameter in parameters]
    yield values
    for parameter, value in zip(parameters, values, strict=True):
        if isinstance(parameter, DTensor):
            spread = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            local(parameter.detach()).copy_(local(spread))


@contextlib.contextmanager
def opened(module: nn.Module) -> Iterator[None]:
    """Makes a module's weights whole while it lasts; what was changed or put in their place is spread again."""
    closed: list[Any] = []
    try:
        with gathered(module.parameters()) as closed:
            yield
    finally:
        new = [
            parameter for parameter in module.parameters() if not is_spread(parameter) and not parameter.requires_grad
        ]
        if closed and new:
            closed[0].convert_to_zero_parameters(param_list=new)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[list[Any]]:
    """Makes parameters whole while it lasts; gives those that were not."""
    closed: list[Any] = [parameter for parameter in parameters if is_spread(parameter) and not is_open(parameter)]
    for parameter in closed:
        parameter.all_gather()
    try:
        yield closed
    finally:
        close(closed)


@contextlib.contextmanager
def readable(linear: Any) -> Iterator[Any]:
    """A linear whose weight and bias are read without calling it: something that has both, whole."""
    with opened(linear):
        if isinstance(linear.weight, DTensor):
            bias = None if linear.bias is None else whole(linear.bias.detach())
            yield SimpleNamespace(weight=whole(linear.weight.detach()), bias=bias)
        else:
            yield linear


@contextlib.contextmanager
def computing(model: Any) -> Iterator[None]:
    """Lets a causal LM compute without the engine that spread it: each module is whole while it runs.

    Its output layer is so throughout, because losses read it without calling it.
    """
    if not is_sharded(model):
        yield
        return
    handles: list[Any] = []
    open_now: dict[nn.Module, contextlib.ExitStack] = {}

    def enter(module: nn.Module, *_: Any) -> None:
        open_now[module] = contextlib.ExitStack()
        open_now[module].enter_context(opened(module))

    def leave(module: nn.Module, *_: Any) -> None:
        open_now.pop(module).close()

    with torch.no_grad(), opened(model.get_output_embeddings()):
        for module in model.modules():
            if any(is_spread(parameter) for parameter in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def close(parameters: list[Any]) -> None:
    """Spreads parameters again, as they are now."""
    for parameter in parameters:
        if is_spread(parameter) and is_open(parameter):
            parameter.partition(has_been_updated=True)


def is_spread(parameter: Any) -> bool:
    """Whether a parameter's content is spread over processes, though it may be whole now."""
    return hasattr(parameter, "ds_id")


def is_open(parameter: Any) -> bool:
    """Whether a parameter that ZeRO-3 spreads is whole now."""
    return parameter.ds_status.name == "AVAILABLE"
