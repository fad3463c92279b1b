"""A base that adapters were trained on in 4 or 8 bit, as the numbers that it stood for: read one tensor at a time.

Either the folder holds bitsandbytes codes, or it holds the original weights and they were quantised as they were
loaded. Merging and writing happen elsewhere. Legend: O outputs, I inputs of a linear.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.core.errors import UnsupportedModelError
from prunetune.model.shards import ShardReader

# What bitsandbytes stores beside a 4-bit weight, under its name.
_STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.")
_SCALES, _FORMAT = ".SCB", ".weight_format"
KINDS = ("nf4", "fp4", "int8")


def stored_kind(config: dict[str, Any]) -> str | None:
    """``nf4``, ``fp4`` or ``int8`` if a model's folder holds such codes; None for plain numbers.

    Args:
        config: of config.json.

    Raises:
        UnsupportedModelError: another quantisation.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if found.get("quant_method") != "bitsandbytes":
        raise UnsupportedModelError(
            f"the base is quantised by {found.get('quant_method')}, which cannot be merged into. Name the original "
            "with --base and, if the adapters were trained beside nf4, fp4 or int8 weights, say so with --quantized"
        )
    return "int8" if found.get("load_in_8bit") else str(found.get("bnb_4bit_quant_type", "fp4"))


class DequantizedReader(ShardReader):
    """A folder of bitsandbytes codes, read as the float32 numbers that they stand for."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._statistics: dict[str, list[str]] = {}
        for name in list(self.entries):
            if any(part in name for part in _STATISTICS):
                self._statistics.setdefault(name.partition(".weight.")[0] + ".weight", []).append(name)
            elif name.endswith(_SCALES):
                self._statistics.setdefault(name.removesuffix(_SCALES) + ".weight", []).append(name)
        stored = dict(self.entries)
        extra = {name for names in self._statistics.values() for name in names}
        self.entries = {name: e for name, e in stored.items() if name not in extra and not name.endswith(_FORMAT)}
        self._last: tuple[str, Tensor] | None = None
        self._stored = stored
        for name in self._statistics:
            shape = tuple(self.read(name).shape)
            self.entries[name] = replace(stored[name], shape=shape, dtype="F32")

    def read(self, name: str) -> Tensor:
        if name not in self._statistics:
            return super().read(name)
        if self._last is None or self._last[0] != name:
            self._last = (name, self._dequantized(name))
        return self._last[1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return super().rows(name, start, stop) if name not in self._statistics else self.read(name)[start:stop]

    def _dequantized(self, name: str) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        codes = super().read(name)
        extra = {key: self._extra(key) for key in self._statistics[name]}
        if all(key.endswith(_SCALES) for key in extra):
            [scale_O] = extra.values()
            return codes.float() * (scale_O.float()[:, None] / 127)
        state = QuantState.from_dict(extra, device=torch.device("cpu"))
        state.dtype = torch.float32  # scale times code, not rounded to what it came from
        dequantised: Tensor = dequantize_4bit(codes, state)
        return dequantised

    def _extra(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.folder / self._stored[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


class RoundedReader(ShardReader):
    """A folder of plain numbers, its linears read as what bitsandbytes makes of them when it loads them.

    Args:
        folder: the original model. config: of its config.json. kind: nf4, fp4 (scales quantised too) or int8.
    """

    def __init__(self, folder: Path, config: dict[str, Any], kind: str):
        super().__init__(folder)
        self._kind = kind
        self._names = {name for name in quantized_names(config) if name in self.entries}
        for name in self._names:
            self.entries[name] = replace(self.entries[name], dtype="F32")
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        if name not in self._names:
            return super().read(name)
        if self._last is None or self._last[0] != name:
            self._last = (name, rounded(super().read(name), self._kind))
        return self._last[1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return super().rows(name, start, stop) if name not in self._names else self.read(name)[start:stop]


def rounded(weight_OI: Tensor, kind: str) -> Tensor:
    """(O, I) float32: a weight after quantisation, as it then acts."""
    from bitsandbytes import functional

    if kind == "int8":
        # As bitsandbytes does it: from float16, one scale a row.
        half = weight_OI.half()
        scale_O = half.float().abs().amax(1, keepdim=True)
        codes = (half.float() * (127 / scale_O.clamp_min(1e-30))).round()
        return codes * (scale_O / 127)
    codes, state = functional.quantize_4bit(weight_OI.contiguous(), quant_type=kind, compress_statistics=True)
    state.dtype = torch.float32
    dequantised: Tensor = functional.dequantize_4bit(codes, state)
    return dequantised


def quantized_names(config: dict[str, Any]) -> list[str]:
    """Weight names of the linears that transformers quantises: all but the output layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **plain))
    head = model.get_output_embeddings()
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
