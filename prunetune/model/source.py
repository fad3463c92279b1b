"""The 16-bit weights that a quantised base was made from: found, checked, cut and quantised again.

A cut would run through quantisation blocks, so what is quantised anew is always the original weight, cut; or the
compensated one. What is about bitsandbytes itself is in quantized.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunetune.core.errors import UnsupportedModelError
from prunetune.model.architecture import describe
from prunetune.model.budget import Shape
from prunetune.model.quantized import (
    LARGEST_ERROR,
    float_linears,
    kind_of,
    quantize_like,
    quantized_linears,
    relative_error,
    require_sound,
    shape_of,
    weight_of,
)
from prunetune.model.resolve import resolve_model
from prunetune.model.shards import ShardReader
from prunetune.model.surgery import Surgery, base_model, plain_path

_FLOATS = ("F32", "BF16", "F16")


class SourceWeights:
    """The original linear weights of a quantised model, read from the folder that it was loaded from, one at a time.

    Args:
        model: a transformers model (or PeftModel of one); its config says where it came from.
        surgery: what it was sliced with, if it was.
        updates: dense path -> (O, I) compensated weight, already sliced, that is taken instead.

    Raises:
        UnsupportedModelError: the folder is not there.
    """

    def __init__(self, model: nn.Module, surgery: Surgery | None = None, updates: Mapping[str, Tensor] | None = None):
        self.folder = _folder(base_model(model).config)
        self.updates = updates or {}
        self._cuts = surgery.cuts if surgery is not None else {}
        self._dense = {surgery.sliced_path(path): path for path in self._cuts} if surgery is not None else {}
        self._reader = ShardReader(self.folder)

    def dense_path(self, path: str) -> str:
        """The path in the dense model of a linear of this one."""
        return self._dense.get(path, path)

    def weight(self, path: str) -> Tensor:
        """(O, I) of a linear of this model, sliced if the model is; raises UnsupportedModelError without one."""
        dense = self.dense_path(path)
        if dense in self.updates:
            return self.updates[dense]
        self.require(path)
        weight = self._reader.read(f"{dense}.weight")
        return self._cuts[dense].apply("weight", weight) if dense in self._cuts else weight

    def require(self, path: str, shape: tuple[int, ...] | None = None) -> None:
        """Raises UnsupportedModelError unless the folder has that weight in 16 or 32 bit, and in that dense shape."""
        name = f"{self.dense_path(path)}.weight"
        entry = self._reader.entries.get(name)
        if entry is None or entry.dtype not in _FLOATS or (shape is not None and entry.shape != shape):
            found = "nothing" if entry is None else f"{entry.dtype} of shape {entry.shape}"
            raise UnsupportedModelError(
                f"{self.folder} has {found} for {name}. A quantised base is cut in the 16-bit weights that it was made "
                "from: load the original model, which is not quantised on disk, with a quantisation config"
            )


def _folder(config: Any) -> Path:
    name = getattr(config, "_name_or_path", "") or ""
    if name and Path(name).is_dir():
        return Path(name)
    try:
        if not name:
            raise UnsupportedModelError("the model was made from no folder")
        return resolve_model(name, getattr(config, "_commit_hash", None)).folder
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"the 16-bit weights of the quantised base were not found (config._name_or_path is {name!r}): {error}. "
            "They are needed to cut it; set model.config._name_or_path to their folder"
        ) from error


def require_cuttable(model: nn.Module, shapes: Iterable[Shape]) -> None:
    """Raises UnsupportedModelError unless a quantised model can be cut later; says nothing about other models.

    Its source must be there and be what it was made from: names and shapes of all linears are checked, the numbers of
    the first and the last one. And this machine must read back 4-bit weights of the widths that are left.

    Args:
        model: the dense model. shapes: what it may be cut to.
    """
    base = base_model(model)
    layers = {plain_path(path): layer for path, layer in quantized_linears(base).items()}
    if not layers:
        return
    source = SourceWeights(base)
    for path, layer in layers.items():
        source.require(path, tuple(shape_of(layer)))
    for path in (next(iter(layers)), next(reversed(layers))):
        _require_near(weight_of(layers[path]), source.weight(path), f"{path} is not what {source.folder} holds")
    example, arch = next(iter(layers.values())), describe(base.config)
    if kind_of(example) != "int8":
        widths = {width for shape in shapes for width in (shape.query_heads * arch.head_dim, shape.mlp_channels)}
        for width in sorted(widths):
            require_sound(width, example.weight.blocksize, example.weight.device)


def requantize(model: nn.Module, surgery: Surgery, updates: Mapping[str, Tensor]) -> float:
    """Quantises what ``slice_model`` left as FloatLinears, from the source's weights or from compensated ones.

    Args:
        model: a sliced model; nothing happens to one without FloatLinears.
        surgery: what it was sliced with.
        updates: dense path -> (O, I) weight that replaces the source's, already sliced.

    Returns:
        The largest relative distance of a quantised weight from what was quantised.

    Raises:
        UnsupportedModelError: the source is not there or not this model's, or a weight cannot be quantised.
    """
    base, largest = base_model(model), 0.0
    waiting = float_linears(base)
    source = SourceWeights(base, surgery, updates) if waiting else None
    for path, linear in waiting.items():
        assert source is not None
        plain = plain_path(path)
        wanted, name = source.weight(plain), source.dense_path(plain)
        if name not in updates:
            _require_near(linear.weight, wanted, f"{name} is not what {source.folder} holds")
        old = linear.replaced[0]
        layer = quantize_like(old, wanted.to(old.weight.device), linear.bias)
        fault = f"{name} cannot be quantised again: its weights spread too far for one scale a block"
        largest = max(largest, _require_near(weight_of(layer), wanted, fault))
        base.set_submodule(path, layer)
    return largest


def _require_near(found: Tensor, wanted: Tensor, fault: str) -> float:
    error = relative_error(found, wanted)
    if not error <= LARGEST_ERROR:
        raise UnsupportedModelError(
            f"{fault}: off by {error:.0%}, where rounding to 4 bit gives 9 to 15% (bound {LARGEST_ERROR:.0%}). "
            "Load the quantised base from the folder that config._name_or_path names, unchanged"
        )
    return error
