"""What the adapters of a quantised model are merged onto, and how far that is from the model that was trained.

Adapters learn beside dequantised weights. Merged onto those, the export is the trained model, exact but for the dtype
that it is written in: what was validated while training is what comes out, so this is the default. Merged onto the
original weights it is another model, as far away as the quantisation's rounding, which is larger than what a short
tuning learns. It may be the better one (14 steps on a real 135M model in nf4: perplexity 33.5 instead of 36.5) or the
worse one, once adapters have learnt to undo that rounding; so it is there on demand, and measured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from prunetune.core.errors import ExportError, UnsupportedModelError
from prunetune.export.live import largest_difference, logits, undecorated
from prunetune.model.divergence import mean_kl
from prunetune.model.quantized import FloatLinear, in_floats, is_quantized, keep_format, kind_of, quantized_linears
from prunetune.model.source import SourceWeights
from prunetune.model.surgery import base_model, plain_path

# In nats a token. Rounding a real 135M model to nf4 moves its answers by 0.3, to fp4 by 0.6 (larger models move less),
# and that is what a merge onto the original weights changes; weights of another model move them by several nats.
TOLERANCE = 1.0


def adapts_quantized(module: nn.Module) -> bool:
    """Whether it is PEFT's layer around a quantised linear, or around what stands in for one."""
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return isinstance(module, LoraLayer) and (is_quantized(base) or isinstance(base, FloatLinear))


def merged_onto(model: nn.Module, source: SourceWeights | None) -> str:
    """The base of the merge in words; empty for a base that is not quantised.

    Raises:
        UnsupportedModelError: other weights are asked for, but the base is not quantised.
    """
    layers = quantized_linears(model)
    if not layers and source is not None:
        raise UnsupportedModelError("this base is not quantised, so there is one base to merge onto; leave base away")
    if not layers:
        return ""
    kind = kind_of(next(iter(layers.values())))
    if source is not None:
        return f"the original weights, not the {kind} ones that were trained with"
    return f"the dequantised {kind} weights that were trained with"


@contextlib.contextmanager
def merging_onto(model: nn.Module, source: SourceWeights | None) -> Iterator[None]:
    """The model with plain numbers for its quantised weights: dequantised, or the original ones."""
    base = base_model(model)
    weights = {}
    if source is not None:
        weights = {path: functools.partial(source.weight, plain_path(path)) for path in quantized_linears(base)}
    with in_floats(base, weights):
        yield


def trained_logits(model: nn.Module, prompts: list[list[int]]) -> list[Tensor] | None:
    """Logits of the quantised model as it was trained, in its own arithmetic; None for any other model."""
    if not quantized_linears(model):
        return None
    keep_format(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return logits(undecorated(model), prompts, next(model.parameters()).device)
    finally:
        for module in training:
            module.training = True


def difference_to_trained(trained: list[Tensor], exported: list[Tensor]) -> dict[str, Any]:
    """How far an export's logits (S, V), a tensor a prompt, are from those of the model that was trained.

    Returns:
        ``kl`` (nats a token), ``agreement`` (share of positions with the same likeliest token), ``logit_difference``
        (the largest), ``tokens``.

    Raises:
        ExportError: they are more than TOLERANCE apart.
    """
    wanted, found = torch.cat(trained), torch.cat(exported)
    kl = mean_kl(wanted, found)
    if not kl <= TOLERANCE:
        raise ExportError(
            f"the export did not verify: its answers are {kl:.2g} nats a token away from the model that was trained "
            f"(allowed {TOLERANCE}), so it is another model. It was discarded; merge onto the trained weights "
            "(export.base: trained), or train without model.quantize"
        )
    return {
        "kl": kl,
        "agreement": float((wanted.argmax(-1) == found.argmax(-1)).double().mean()),
        "logit_difference": largest_difference(trained, exported),
        "tokens": len(wanted),
    }


def describe_difference(found: Mapping[str, Any]) -> str:
    """``difference_to_trained`` as a sentence."""
    return (
        f"against the quantised model that was trained: {found['kl']:.2g} nats a token apart, the same likeliest token "
        f"at {found['agreement']:.0%} of {found['tokens']} positions, logits within {found['logit_difference']:.2g}"
    )
