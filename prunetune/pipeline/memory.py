"""Peak memory of training, part by part, by arithmetic on widths; nothing is loaded.

The activation coefficients were counted: the tensors that autograd saves for one decoder layer with adapters
and gates, per token, as a linear function of the widths. The rest was fitted to the peak of real steps on a CPU
(within 7%, with and without activation checkpointing). Legend: D hidden, Q query features, C key and value
features, F MLP width, r adapter rank.
"""

from __future__ import annotations

import re

from prunetune.config.schema import RunConfig
from prunetune.model.architecture import Architecture
from prunetune.model.budget import DTYPE_BYTES, Shape, decoder_params, layer_decoder_params, total_params
from prunetune.model.units import HIDDEN

# TRL's fused head works on tiles of logits of at most this many tokens and columns. Without a GPU kernel about
# nine float32 copies of a tile are alive at once; with one, a single tile in the compute dtype.
_TILE_TOKENS, _TILE_COLUMNS, _TILE_COPIES = 4096, 32768, 9
# Python, torch and the other libraries before anything is loaded.
_LIBRARIES_BYTES = 450 * 10**6
# Bytes of a quantised parameter: its code, and its share of a block's scale (64 weights), which 4-bit kinds keep in a
# byte plus a share of a second scale (256 blocks); int8 has one float32 scale a row, which is too little to count.
_STORED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "fp4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# Adapter weight, gradient and AdamW's two moments, all float32.
_TRAINED_BYTES = 16


def lora_params(arch: Architecture, shape: Shape, rank: int, targets: str | tuple[str, ...]) -> int:
    """Parameters of the adapters on a model of this shape."""
    q, kv = shape.query_heads * arch.head_dim, shape.kv_groups * arch.head_dim
    d, f = shape.width(arch), shape.mlp_channels
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


def training_memory(arch: Architecture, shape: Shape, config: RunConfig, *, gpu: bool) -> dict[str, int]:
    """Bytes at the peak of a training step of a model of this shape, by part; one process.

    Args:
        gpu: whether it is a GPU's memory that is asked about; else it is main memory.
    """
    tokens = config.train.batch_size * config.train.max_length
    adapters = lora_params(arch, shape, config.lora.rank, config.lora.targets)
    parts = {
        "base weights": _base_bytes(arch, shape, config),
        "bfloat16 copies of them": _copies_bytes(arch, shape, config),
        "one weight, dequantised": _dequantized_bytes(arch, shape, config),
        "adapters and optimizer": adapters * _TRAINED_BYTES,
        "activations": tokens * _activation_bytes_per_token(arch, shape, config),
        "logits": _head_bytes(arch, shape, tokens, gpu),
    }
    return {name: size for name, size in parts.items() if size} | ({} if gpu else {"libraries": _LIBRARIES_BYTES})


def _base_bytes(arch: Architecture, shape: Shape, config: RunConfig) -> int:
    """The decoder's linears as they are stored, everything else in the base's dtype."""
    total, linears = total_params(arch, shape), decoder_params(arch, shape)
    dtype_bytes = DTYPE_BYTES[config.model.dtype]
    stored = _STORED_BYTES[config.model.quantize] if config.model.quantize else dtype_bytes
    return (total - linears) * dtype_bytes + round(linears * stored)


def _dequantized_bytes(arch: Architecture, shape: Shape, config: RunConfig) -> int:
    """The largest linear of a quantised base in the dtype that it computes in."""
    if config.model.quantize is None:
        return 0
    width = max(shape.mlp_channels, shape.query_heads * arch.head_dim)
    return width * shape.width(arch) * (2 if config.train.bf16 else DTYPE_BYTES[config.model.dtype])


def _copies_bytes(arch: Architecture, shape: Shape, config: RunConfig) -> int:
    """Autocast's copies of the frozen weights, which the backward pass needs; under checkpointing one layer's."""
    if not config.train.bf16 or config.model.dtype != "float32" or config.model.quantize:
        return 0
    layers = 1 if config.train.activation_checkpointing else shape.layers
    return layers * layer_decoder_params(arch, shape) * 2


def _activation_bytes_per_token(arch: Architecture, shape: Shape, config: RunConfig) -> int:
    d, q = shape.width(arch), shape.query_heads * arch.head_dim
    kv, f = shape.kv_groups * arch.head_dim, shape.mlp_channels
    half = config.train.bf16 or config.model.dtype != "float32"
    word = 2 if half else 4
    # Norms and the residual stream stay float32 under autocast, hence no `word` on D.
    layer = (18 if half else 16) * d + word * (3 * q + 2 * kv + 5 * f + 7 * config.lora.rank)
    if HIDDEN in config.target.units and not shape.hidden:
        layer += 2 * word * d  # until the cut, what the gates behind o and down multiply
    if config.train.activation_checkpointing:
        return shape.layers * 4 * d + layer
    return shape.layers * layer


def _head_bytes(arch: Architecture, shape: Shape, tokens: int, gpu: bool) -> int:
    columns = min(arch.vocab_size, _TILE_COLUMNS)
    tile = min(tokens, _TILE_TOKENS) * columns * (2 if gpu else 4 * _TILE_COPIES)
    # Beside the tile: hidden states with their gradient, and its rows of the head, all float32.
    return tile + 2 * tokens * shape.width(arch) * 4 + columns * shape.width(arch) * 4
