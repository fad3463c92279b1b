"""Applying a plan: to one named tensor, to a live model in place, to a config. Nothing here decides anything.

One table of cuts serves weights, biases, LoRA factors, DoRA magnitudes and optimizer moments, because all of
them are rows or columns of the same linear modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.core.errors import UnsupportedModelError
from prunetune.model.architecture import Architecture, describe
from prunetune.model.budget import plan_shape
from prunetune.model.families import Columns, Rows, Writers
from prunetune.model.legality import config_values
from prunetune.model.plan import Plan
from prunetune.model.quantized import FloatLinear, is_quantized, shape_of, weight_of
from prunetune.model.sharded import opened
from prunetune.model.stream import slice_stream
from prunetune.model.units import HIDDEN, span_features


@dataclass(frozen=True)
class Cut:
    """What stays of a linear module: output features and input features; None keeps all."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter of the module, sliced; ``name`` says which of its features the tensor carries."""
        rows, columns = _carries(name)
        if rows and self.rows is not None:
            tensor = tensor.index_select(0, self.rows.to(tensor.device))
        if columns and self.columns is not None:
            tensor = tensor.index_select(1, self.columns.to(tensor.device))
        return tensor


def _carries(name: str) -> tuple[bool, bool]:
    """Whether a parameter has the linear's output features as rows, and its input features as columns."""
    if "lora_A" in name:
        return False, True
    if "lora_B" in name or "lora_magnitude_vector" in name or name.endswith("bias"):
        return True, False
    return True, True


class Surgery:
    """A plan made ready for one model.

    Args:
        arch: the dense model.
        plan: what stays.

    Attributes:
        cuts: linear's path in the dense model (no PEFT prefix) -> Cut, for every layer that stays.

    Raises:
        PlanMismatchError: the plan is not one of this model.
    """

    def __init__(self, arch: Architecture, plan: Plan):
        plan.check(arch)
        self.arch, self.plan = arch, plan
        self.layers = plan.kept_layers(arch)
        self._renumber = {old: new for new, old in enumerate(self.layers)}
        self.cuts = {
            f"{arch.family.layers}.{layer}.{arch.family.modules[role]}": self._cut(layer, role)
            for layer in self.layers
            for role in arch.family.modules
        }
        layers, modules = re.escape(arch.family.layers), "|".join(map(re.escape, arch.family.modules.values()))
        self._layer_path = re.compile(rf"(^|\.){layers}\.(\d+)\.")
        self._module_path = re.compile(rf"(?:^|\.)({layers}\.\d+\.(?:{modules}))\.")

    def rename(self, name: str) -> str | None:
        """A dense model's parameter or module name in the sliced model; None if its layer leaves."""
        match = self._layer_path.search(name)
        if not match:
            return name
        layer = self._renumber.get(int(match.group(2)))
        if layer is None:
            return None
        return f"{name[: match.start(2)]}{layer}{name[match.end(2) :]}"

    def sliced_path(self, path: str) -> str:
        """The path of a linear that stays, in the sliced model."""
        # A trailing dot, because renaming looks for a layer's number between dots.
        return str(self.rename(f"{path}.")).rstrip(".")

    def slice_parameter(self, name: str, tensor: Tensor) -> Tensor | None:
        """One tensor under its dense name (PEFT names too), sliced; None if its layer leaves.

        Serves anything shaped like the parameter, such as its Adam moments.
        """
        if self.rename(name) is None:
            return None
        match = self._module_path.search(name)
        return self.cuts[match.group(1)].apply(name, tensor) if match else tensor

    def _cut(self, layer: int, role: str) -> Cut:
        rows: Tensor | None = None
        columns: Tensor | None = None
        family = self.arch.family
        for kind in (*family.units, HIDDEN):
            for part in family.parts(kind):
                if isinstance(part, Writers) or part.role != role:
                    continue
                kept = _features(self._kept(layer, kind, part), span_features(self.arch, part.span))
                if isinstance(part, Rows):
                    rows = kept
                elif isinstance(part, Columns):
                    columns = kept
        full_rows, full_columns = self.full_shape(role)
        return Cut(_unless_all(rows, full_rows), _unless_all(columns, full_columns))

    @property
    def consumers(self) -> list[str]:
        """Paths of the linears that lose inputs of their own, not just dimensions of the residual stream."""
        own = {
            part.role
            for kind in self.arch.family.units
            for part in self.arch.family.parts(kind)
            if isinstance(part, Columns)
        }
        modules = tuple(f".{self.arch.family.modules[role]}" for role in own)
        return [path for path, cut in self.cuts.items() if cut.columns is not None and path.endswith(modules)]

    def _kept(self, layer: int, kind: str, part: Any) -> tuple[int, ...]:
        """Kept indices in units of the part's span. Where groups and heads share features (q and o), heads decide:
        they are listed last in the table and already leave with their group."""
        if kind == "query_heads":
            return self.plan.kept_query_heads(self.arch, layer)
        return self.plan.kept_units(self.arch, layer, kind)

    def full_shape(self, role: str) -> tuple[int, int]:
        """(outputs, inputs) of a role's linear in the dense model."""
        arch = self.arch
        q, kv, d = arch.query_heads * arch.head_dim, arch.kv_groups * arch.head_dim, arch.hidden_size
        return {
            "q": (q, d),
            "k": (kv, d),
            "v": (kv, d),
            "o": (d, q),
            "gate": (arch.mlp_channels, d),
            "up": (arch.mlp_channels, d),
            "down": (d, arch.mlp_channels),
        }[role]

    def config_values(self) -> dict[str, Any]:
        """The config fields of the sliced model, per-layer lists included."""
        values = config_values(self.arch, plan_shape(self.arch, self.plan))
        for name in self.arch.family.per_layer_lists:
            entries = self.arch.config.get(name)
            if entries is not None:
                values[name] = [entries[layer] for layer in self.layers]
        return values


def _features(units: Iterable[int], span: int) -> Tensor:
    starts = torch.tensor(list(units), dtype=torch.long) * span
    return (starts[:, None] + torch.arange(span)).reshape(-1)


def _unless_all(kept: Tensor | None, full: int) -> Tensor | None:
    return None if kept is None or kept.numel() == full else kept


def slice_model(model: nn.Module, plan: Plan, *, rounded: bool = True) -> Architecture:
    """Slices a live dense model in place: weights, biases, adapters, widths, config.

    Afterwards the model's parameters are new, smaller tensors: optimizers must be made anew. A linear that
    bitsandbytes quantised cannot be cut through its blocks: a FloatLinear computes what is left of it, exactly, until
    ``source.requantize`` replaces it.

    Args:
        model: a transformers causal LM or a PeftModel of one; of base weights spread over processes one linear is
            whole at a time, adapters must be whole.
        plan: what stays.
        rounded: false leaves what a narrower residual stream rescales in float64, for a comparison with the masked
            model in that arithmetic; ``stream.round_stream`` must follow.

    Returns:
        The dense architecture, for slicing what belongs to it (checkpoints, moments) later.

    Raises:
        PlanMismatchError: the plan is not one of this model.
        UnsupportedModelError: the weights are quantised in a way that cannot be cut (GPTQ, AWQ, ...).
    """
    base = base_model(model)
    surgery = Surgery(describe(base.config), plan)
    if foreign := foreign_quantization(model):
        raise UnsupportedModelError(
            f"{foreign}: its packed weights cannot be cut. Load the base in bfloat16, or in nf4"
        )
    _drop_layers(base, surgery)
    for dense_name, cut in surgery.cuts.items():
        name = surgery.sliced_path(dense_name)
        _stand_in(base, name, cut)
        linear = base.get_submodule(name)
        with opened(linear):
            _slice_linear(linear, cut)
    slice_stream(base, surgery.arch, plan.kept_units(surgery.arch, -1, HIDDEN), rounded=rounded)
    _update_widths(base, surgery)
    return surgery.arch


def base_model(model: nn.Module) -> Any:
    """The plain transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def plain_path(path: str) -> str:
    """A linear's path in the plain model, from its path inside a PEFT layer."""
    return path.removesuffix(".base_layer")


def foreign_quantization(model: nn.Module) -> str | None:
    """The method that a model is quantised with if it is not bitsandbytes, in words."""
    method = getattr(base_model(model), "quantization_method", None)
    name = str(getattr(method, "value", method))
    return None if method is None or name == "bitsandbytes" else f"the base is quantised with {name}"


def _stand_in(base: Any, name: str, cut: Cut) -> None:
    """Puts a FloatLinear of what is left in place of a quantised linear that loses rows or columns."""
    path = f"{name}.base_layer" if hasattr(base.get_submodule(name), "base_layer") else name
    layer = base.get_submodule(path)
    if not is_quantized(layer) or (cut.rows is None and cut.columns is None):
        return
    rows, columns = (
        full if kept is None else kept.numel() for kept, full in zip((cut.rows, cut.columns), shape_of(layer))
    )
    linear = FloatLinear(layer, lambda: cut.apply("weight", weight_of(layer)), torch.Size((rows, columns)))
    base.set_submodule(path, linear)


def _drop_layers(base: Any, surgery: Surgery) -> None:
    if len(surgery.layers) == surgery.arch.layers:
        return
    parent_path, _, attribute = surgery.arch.family.layers.rpartition(".")
    parent = base.get_submodule(parent_path)
    layers = getattr(parent, attribute)
    kept = nn.ModuleList([layers[old] for old in surgery.layers])
    for index, layer in enumerate(kept):
        numbered: Any
        for numbered in layer.modules():
            if hasattr(numbered, "layer_idx"):
                numbered.layer_idx = index
    setattr(parent, attribute, kept)


def _slice_linear(module: nn.Module, cut: Cut) -> None:
    """Slices a linear or a PEFT layer around one, adapters and all."""
    if cut.rows is None and cut.columns is None:
        return
    for path, child in module.named_modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            sliced = cut.apply(f"{path}.{name}", parameter.data)
            if sliced is not parameter.data:
                setattr(child, name, nn.Parameter(sliced.contiguous(), requires_grad=parameter.requires_grad))
        if hasattr(child, "in_features"):
            rows, columns = _carries(f"{path}.weight")
            if columns and cut.columns is not None:
                child.in_features = cut.columns.numel()
            if rows and cut.rows is not None:
                child.out_features = cut.rows.numel()


def _update_widths(base: Any, surgery: Surgery) -> None:
    shape = plan_shape(surgery.arch, surgery.plan)
    for name, value in surgery.config_values().items():
        setattr(base.config, name, value)
    for layer in base.get_submodule(surgery.arch.family.layers):
        for module in layer.modules():
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = shape.queries_per_group
            if hasattr(module, "intermediate_size"):
                module.intermediate_size = shape.mlp_channels
