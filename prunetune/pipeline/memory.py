"""Peak memory of training, part by part, by arithmetic on widths; nothing is loaded.

The activation coefficients were counted, not guessed: the tensors that autograd saves for one decoder layer
with adapters and gates, per token, as a linear function of the widths. Legend: D hidden, Q query features,
C key and value features, F MLP width, r adapter rank.
"""

from __future__ import annotations

import re

from prunetune.config.schema import RunConfig
from prunetune.model.architecture import Architecture
from prunetune.model.budget import DTYPE_BYTES, Shape, decoder_params, total_params

# TRL's fused head works on tiles of logits of at most this many tokens and columns; without a GPU kernel about
# four float32 copies of a tile are alive at once.
_TILE_TOKENS, _TILE_COLUMNS, _TILE_COPIES = 4096, 32768, 4
# Adapter weight, gradient and AdamW's two moments, all float32.
_TRAINED_BYTES = 16


def lora_params(arch: Architecture, shape: Shape, rank: int, targets: str | tuple[str, ...]) -> int:
    """Parameters of the adapters on a model of this shape."""
    q, kv = shape.query_heads * arch.head_dim, shape.kv_groups * arch.head_dim
    d, f = arch.hidden_size, shape.mlp_channels
    ends = {"q": d + q, "k": d + kv, "v": d + kv, "o": q + d, "gate": d + f, "up": d + f, "down": f + d}
    return shape.layers * rank * sum(ends[role] for role in adapted_roles(arch, targets))


def adapted_roles(arch: Architecture, targets: str | tuple[str, ...]) -> list[str]:
    """Which of q, k, v, o, gate, up, down get an adapter, by PEFT's rules for ``target_modules``."""
    chosen = []
    for role, module in arch.family.modules.items():
        path = f"{arch.family.layers}.0.{module}"
        if isinstance(targets, str):
            hit = targets == "all-linear" or re.fullmatch(targets, path) is not None
        else:
            hit = any(path == name or path.endswith(f".{name}") for name in targets)
        if hit:
            chosen.append(role)
    return chosen


def training_memory(arch: Architecture, shape: Shape, config: RunConfig) -> dict[str, int]:
    """Bytes at the peak of a training step of a model of this shape, by part; one process."""
    train, dtype = config.train, config.model.dtype
    tokens = train.batch_size * train.max_length
    rank = config.lora.rank
    copies = decoder_params(arch, shape) * 2 if train.bf16 and dtype == "float32" else 0
    adapters = lora_params(arch, shape, rank, config.lora.targets)
    return {
        "base weights": total_params(arch, shape) * DTYPE_BYTES[dtype],
        "bfloat16 copies of them": copies,
        "adapters and optimizer": adapters * _TRAINED_BYTES,
        "activations": tokens * _activation_bytes_per_token(arch, shape, config),
        "logits": _head_bytes(arch, tokens),
    }


def _activation_bytes_per_token(arch: Architecture, shape: Shape, config: RunConfig) -> int:
    d, q = arch.hidden_size, shape.query_heads * arch.head_dim
    kv, f = shape.kv_groups * arch.head_dim, shape.mlp_channels
    half = config.train.bf16 or config.model.dtype != "float32"
    word = 2 if half else 4
    # Norms and the residual stream stay float32 under autocast, hence no `word` on D.
    layer = (18 if half else 16) * d + word * (3 * q + 2 * kv + 5 * f + 7 * config.lora.rank)
    if config.train.activation_checkpointing:
        return shape.layers * 4 * d + layer
    return shape.layers * layer


def _head_bytes(arch: Architecture, tokens: int) -> int:
    tile = min(tokens, _TILE_TOKENS) * min(arch.vocab_size, _TILE_COLUMNS) * 4
    # Hidden states and their gradient in float32, beside the tile.
    return tile * _TILE_COPIES + 2 * tokens * arch.hidden_size * 4
