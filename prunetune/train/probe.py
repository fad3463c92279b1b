"""Masked equals sliced, checked on the live model at the freeze: logits of a fixed batch before and after the cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunetune.core.errors import PlanMismatchError
from prunetune.core.streams import stream
from prunetune.model.quantized import in_floats
from prunetune.model.surgery import base_model

# float32 moves the logits of a real 135M model by 3e-4 (its largest activations are in the thousands), so a sharp
# check needs float64: there the difference is 0. A float64 copy of a larger model may not fit beside it.
EXACT_LIMIT_PARAMETERS = 1_000_000_000
EXACT_BOUND = 1e-6


def probe_logits(model: nn.Module, vocabulary: int, device: Any, *, exact: bool) -> Tensor:
    """(2, 16, V) float64 logits of a fixed batch; ``exact``: in float64 arithmetic, else in the weights' own.

    A quantised model is computed with its dequantised weights.
    """
    ids = torch.from_numpy(stream(0, "freeze.probe").integers(0, vocabulary, (2, 16))).to(device)
    model.eval()
    arithmetic = _in_float64(model) if exact else contextlib.nullcontext()
    with torch.no_grad(), in_floats(model), arithmetic:
        return base_model(model)(input_ids=ids, use_cache=False).logits.double()


def require_equal(masked: Tensor, sliced: Tensor, model: nn.Module, *, exact: bool) -> None:
    """Raises PlanMismatchError unless slicing left the logits of the masked model as they were.

    Args:
        masked: logits of the dense model with closed gates.
        sliced: logits of the sliced model, before compensation.
        model: the sliced model. exact: whether both were computed in float64.
    """
    difference = float((masked - sliced).abs().max())
    # Rounded, the two models add in different orders; the exact comparison is then the one at export.
    rounded = 64 * torch.finfo(next(base_model(model).parameters()).dtype).eps * float(masked.abs().max())
    bound = EXACT_BOUND if exact else rounded
    if not difference <= bound:
        raise PlanMismatchError(
            f"slicing changed the model: logits differ by {difference:.2e} from the masked model (bound {bound:.2e}). "
            "The unit table of this family does not fit this model; the last checkpoint is as it was."
        )


@contextlib.contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """All floating tensors of the model in float64, and what is computed; the very same tensors are put back."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}.values()
    kept = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in kept:
            tensor.data = data.double()
        with _NoFloat32():
            yield
    finally:
        for tensor, data in kept:
            tensor.data = data


class _NoFloat32(TorchFunctionMode):
    """Leaves float64 tensors as they are where transformers' norms would compute in float32.

    A narrower stream takes other numbers into a norm, and rounding them moves real logits by 1e-3.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_float32 = func is torch.Tensor.float or (
            func is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype"))
        )
        if to_float32 and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)
