"""Logits in float32: of the live model without disturbing it, and what float32 arithmetic itself does to them.

What is compared with what is decided in verify.py. Legend: S sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.model.surgery import base_model

_PEFT_PATH = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


@contextlib.contextmanager
def in_float32(model: nn.Module, constants: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    """The model in float32 on ``device``, in evaluation mode and full precision, exactly restored afterwards.

    In place, because a copied model would still call the original through the forward that TRL patched in.
    ``constants`` are the buffers of the float32 model: what a class computes at construction (Gemma's embedding
    scale) is rounded in a 16-bit model and would be taken for a difference of the weights.
    """
    base = base_model(model)
    values = {id(parameter): parameter.data.to(device, torch.float32) for parameter in model.parameters()}
    for name, buffer in base.named_buffers():
        values[id(buffer)] = constants.get(_PEFT_PATH.sub("", name), buffer.data).to(device)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) in values]
    kept = [tensor.data for tensor in tensors]
    training = [module for module in model.modules() if module.training]
    attention = getattr(base.config, "_attn_implementation", None) or ""
    precision = torch.get_float32_matmul_precision()
    try:
        for tensor in tensors:
            tensor.data = values[id(tensor)]
        model.eval()
        torch.set_float32_matmul_precision("highest")
        if "flash" in attention:
            base.set_attn_implementation("sdpa")  # flash attention exists in 16 bit only
        yield
    finally:
        for tensor, data in zip(tensors, kept):
            tensor.data = data
        for module in training:
            module.training = True
        torch.set_float32_matmul_precision(precision)
        if "flash" in attention:
            base.set_attn_implementation(attention)


def undecorated(model: nn.Module) -> Any:
    """The forward of the transformers model (its linears carry the adapters), free of accelerate's autocast."""
    base = base_model(model)
    return vars(base).get("_original_forward", base)


def logits(call: Any, prompts: list[list[int]], device: torch.device) -> list[Tensor]:
    """Float32 logits (S, V) on the CPU, one tensor per prompt."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        outputs = [call(input_ids=torch.tensor([prompt], device=device), use_cache=False) for prompt in prompts]
        return [output.logits[0].float().cpu() for output in outputs]


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max(
        float((a - b).abs().max()) if bool(torch.isfinite(a + b).all()) else float("inf") for a, b in zip(left, right)
    )


def float32_noise(model: nn.Module, sequences: list[list[int]], device: torch.device) -> float:
    """How far float32 arithmetic moves a float32 model's logits: the largest difference to float64.

    The model is handed back exactly as it was, because every float32 is a float64.
    """
    single = logits(model, sequences, device)
    model.double()
    try:
        return largest_difference(single, logits(model, sequences, device))
    finally:
        model.float()
