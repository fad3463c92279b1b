"""What an optimizer and its schedule have learnt, by parameter name: one safetensors file for every engine.

All tensors are whole, so that a run may go on under another engine or with another number of processes, and the
freeze can slice them with their parameters. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunetune.core.errors import DataError
from prunetune.model.ranks import Ranks
from prunetune.model.surgery import Surgery

MOMENTS_FILE = "optimizer.safetensors"
# Parameter names have dots and slashes may come; a colon never does.
_BETWEEN = ":"


@dataclass(frozen=True)
class Moments:
    """The state of an optimizer and its learning rate schedule.

    Args:
        tensors: parameter name -> what the optimizer keeps for it (AdamW: ``exp_avg``, ``exp_avg_sq``, ``step``), each
            of the parameter's whole shape or a scalar, on the CPU.
        groups: the optimizer's param groups with names instead of parameters; the learning rate of the next step is
            among their settings.
        scheduler: the scheduler's ``state_dict``.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes the file into a checkpoint."""
        flat = {f"{key}{_BETWEEN}{name}": t.contiguous() for name, of in self.tensors.items() for key, t in of.items()}
        facts = {"groups": json.dumps(self.groups), "scheduler": json.dumps(self.scheduler)}
        save_file(flat, folder / MOMENTS_FILE, metadata=facts)

    @staticmethod
    def load(folder: Path) -> Moments:
        """Reads a checkpoint's file; raises DataError if it is damaged."""
        path = folder / MOMENTS_FILE
        tensors: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                for label in file.keys():  # noqa: SIM118 - not a dict
                    key, _, name = label.partition(_BETWEEN)
                    tensors.setdefault(name, {})[key] = file.get_tensor(label)
            return Moments(tensors, json.loads(facts["groups"]), json.loads(facts["scheduler"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}); resume from an earlier checkpoint") from error

    def sliced(self, surgery: Surgery) -> Moments:
        """The state for the sliced model: moments cut like their parameters, removed layers left out."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, kept in self.tensors.items():
            if (new_name := surgery.rename(name)) is not None:
                tensors[new_name] = {key: _cut(name, value, surgery) for key, value in kept.items()}
        groups = [{**group, "params": _renamed(group["params"], surgery)} for group in self.groups]
        return replace(self, tensors=tensors, groups=groups)

    def resized(self, ranks: Ranks) -> Moments:
        """The sliced state for other ranks: new ones begin at 0, adapters that leave are left out."""
        tensors = {
            name: {key: value if value.dim() == 0 else ranks.resize(name, value) for key, value in kept.items()}
            for name, kept in self.tensors.items()
            if not ranks.leaves(name)
        }
        stay = [[name for name in group["params"] if not ranks.leaves(name)] for group in self.groups]
        groups = [{**group, "params": names} for group, names in zip(self.groups, stay, strict=True)]
        return replace(self, tensors=tensors, groups=groups)


def _cut(name: str, value: Tensor, surgery: Surgery) -> Tensor:
    if value.dim() == 0:
        return value
    sliced = surgery.slice_parameter(name, value)
    assert sliced is not None, "parameters of removed layers were left out before"
    return sliced.contiguous()


def _renamed(names: list[str], surgery: Surgery) -> list[str]:
    return [new for name in names if (new := surgery.rename(name)) is not None]
