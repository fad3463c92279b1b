"""Adapters of other ranks: the same change for a live model, a checkpoint's tensors and PEFT's config.

Nothing here decides anything. Legend: O output and I input features of a linear, r LoRA rank.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from prunetune.core.errors import PlanMismatchError
from prunetune.core.files import write_json
from prunetune.core.streams import stream
from prunetune.model.surgery import base_model

_NUMBER = re.compile(r"\d")
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<kind>[AB])\.(?:[^.]+\.)?weight$")


@dataclass(frozen=True)
class RankChange:
    """What becomes of one adapter; without any rank it leaves.

    Args:
        kept: the ranks that stay, ascending.
        added: new ones behind them: B is 0 there, so they do nothing until they are trained.
        alpha: PEFT's ``lora_alpha``, which keeps the scale s of the delta s B A what it was.
    """

    kept: tuple[Annotated[int, Field(ge=0)], ...]
    added: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @property
    def rank(self) -> int:
        """The adapter's rank from now on."""
        return len(self.kept) + self.added


@dataclass(frozen=True)
class Ranks:
    """The ranks of all adapters of a sliced model.

    Args:
        changes: path in the sliced model -> change, of every LoRA layer, also of those that stay as they are.
        seed: of the run; new rows of A are drawn from it and their adapter's path.
    """

    changes: Mapping[str, RankChange]
    seed: int

    @staticmethod
    def of(model: nn.Module, decided: Mapping[str, RankChange], seed: int) -> Ranks:
        """What was decided, with the alphas that keep every scale; the other adapters stay as they are."""
        changes = {}
        for path, layer in _layers(model):
            [name] = layer.active_adapters
            rank, alpha = layer.r[name], layer.lora_alpha[name]
            change = decided.get(path, RankChange(tuple(range(rank))))
            if change.rank != rank:
                # rsLoRA divides by the root of the rank.
                alpha = layer.scaling[name] * (math.sqrt(change.rank) if layer.use_rslora[name] else change.rank)
            changes[path] = replace(change, alpha=float(alpha))
        return Ranks(changes, seed)

    def save(self, path: Path) -> None:
        """Writes them as JSON."""
        write_json(path, {"seed": self.seed, "changes": {name: asdict(of) for name, of in self.changes.items()}})

    @staticmethod
    def load(path: Path) -> Ranks:
        """Reads what ``save`` wrote; raises PlanMismatchError if the file is something else."""
        try:
            return _READER.validate_json(path.read_bytes(), strict=True)
        except ValidationError as error:
            raise PlanMismatchError(
                f"{path} is not what a freeze writes; restore it, or train anew: {error}"
            ) from error

    def leaves(self, name: str) -> bool:
        """Whether a parameter belongs to an adapter that leaves."""
        match = _FACTOR.match(name)
        return match is not None and match["path"] in self.changes and not self.changes[match["path"]].rank

    def resize(self, name: str, tensor: Tensor, *, draw: bool = False) -> Tensor:
        """A factor of an adapter that stays, or anything shaped like it, at its new rank.

        Args:
            name: the parameter's, in the model or in PEFT's file. tensor: A's (r, I) or B's (O, r); what is no factor
                of these adapters comes back as it is.
            draw: fill new rows of A as PEFT draws A, not with 0 (as moments need it).
        """
        match = _FACTOR.match(name)
        change = self.changes.get(match["path"]) if match else None
        if match is None or change is None:
            return tensor
        axis = 0 if match["kind"] == "A" else 1
        tensor = tensor.index_select(axis, torch.tensor(change.kept, dtype=torch.long, device=tensor.device))
        if not change.added:
            return tensor
        size = [*tensor.shape]
        size[axis] = change.added
        new = tensor.new_zeros(size)
        if draw and axis == 0:
            bound = 1 / math.sqrt(size[1])
            drawn = stream(self.seed, "new ranks", match["path"]).uniform(-bound, bound, size)
            new = torch.from_numpy(drawn).to(tensor)
        return torch.cat([tensor, new], axis)

    def config_fields(self) -> dict[str, Any]:
        """Fields of PEFT's config that say where adapters are, their ranks and scales, all by whole paths.

        What the user wrote there goes: PEFT takes the first pattern that fits, and layers may have other numbers now.
        """
        stay = {path: change for path, change in self.changes.items() if change.rank}
        return {
            "target_modules": sorted(stay),
            **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
            "rank_pattern": {path: change.rank for path, change in stay.items()},
            "alpha_pattern": {path: change.alpha for path, change in stay.items()},
        }

    def change(self, model: nn.Module) -> None:
        """Changes the adapters of a live sliced model; a model without adapters stays as it is.

        Factors are new tensors afterwards: optimizers must be made anew.
        """
        base = base_model(model)
        for path, layer in _layers(model):
            change, [name] = self.changes.get(path), layer.active_adapters
            if change is None or max(change.kept, default=0) >= layer.r[name]:
                raise PlanMismatchError(
                    f"the ranks kept from the freeze do not fit the adapter of {path}: they belong to another run"
                )
            if change.rank:
                self._change(path, layer, change)
            else:
                base.set_submodule(path, layer.base_layer)
        configs: dict[str, Any] = getattr(model, "peft_config", {})
        for name, config in configs.items():
            configs[name] = copy.copy(config)  # the user's own stays as it is
            for field, value in self.config_fields().items():
                setattr(configs[name], field, value)

    def _change(self, path: str, layer: Any, change: RankChange) -> None:
        [name] = layer.active_adapters
        if change.rank == layer.r[name] and not change.added:
            return
        for kind, factor in (("A", layer.lora_A[name]), ("B", layer.lora_B[name])):
            resized = self.resize(f"{path}.lora_{kind}.weight", factor.weight.data, draw=True).contiguous()
            factor.weight = nn.Parameter(resized, requires_grad=factor.weight.requires_grad)
        layer.lora_A[name].out_features = layer.lora_B[name].in_features = layer.r[name] = change.rank
        layer.lora_alpha[name] = change.alpha
        layer.set_scale(name, 1.0)

    def __str__(self) -> str:
        stay = [change.rank for change in self.changes.values() if change.rank]
        return f"{len(stay)} of {len(self.changes)} adapters stay, of rank {min(stay)} to {max(stay)}"


_READER = TypeAdapter(Ranks)


def names_layers(model: nn.Module) -> bool:
    """Whether PEFT's config says by layers' numbers where adapters are, or which rank or scale they have."""
    for config in getattr(model, "peft_config", {}).values():
        words = [config.rank_pattern or (), config.alpha_pattern or (), config.target_modules, config.exclude_modules]
        found = [word for part in words if part for word in ([part] if isinstance(part, str) else part)]
        if config.layers_to_transform is not None or any(_NUMBER.search(word) for word in found):
            return True
    return False


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(path in the plain model, PEFT's layer) of every adapter."""
    return [(path, layer) for path, layer in base_model(model).named_modules() if isinstance(layer, LoraLayer)]
