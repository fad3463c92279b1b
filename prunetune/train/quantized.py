"""QuantizedTrainer: training on a base that bitsandbytes quantised, with adapters in the precision they were made in.

What a freeze does to such a base is in model/source.py.
"""

from __future__ import annotations

from typing import Any

import torch

from prunetune.model.quantized import keep_format, kind_of, quantized_linears, require_sound
from prunetune.train.guarded import GuardedTrainer


class QuantizedTrainer(GuardedTrainer):
    """GuardedTrainer that keeps a quantised base readable and its adapters in float32.

    TRL casts the adapters of a quantised base to bfloat16. With 8 bits of precision a weight of 0.05 does not move at
    all by an AdamW step of 1e-4, and the second half of a schedule takes smaller ones: so they get back the precision
    that PEFT made them in. Adapters that the model came with get back their very values.

    Raises:
        UnsupportedModelError: this machine's kernels do not read back a 4-bit base of such widths.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        named = getattr(model, "named_parameters", None)
        brought = {name: p.data for name, p in named() if p.requires_grad} if named is not None else {}
        super().__init__(model, *args, **kwargs)
        layers = quantized_linears(self.model).values()
        for layer in layers:
            if kind_of(layer) != "int8":
                require_sound(layer.in_features, layer.weight.blocksize, layer.weight.device)
        keep_format(self.model)
        for name, parameter in self.model.named_parameters():
            if layers and parameter.requires_grad:
                own = brought.get(name)
                parameter.data = parameter.data.to(torch.float32) if own is None else own.to(parameter.device)
