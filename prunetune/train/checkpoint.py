"""Checkpoints that carry the joint state, are complete or not there, and can be sliced.

A checkpoint is the Trainer's folder plus ``mask.safetensors`` and, written last, ``prunetune.json`` with the
size of every file: a folder without it, or with a file of another size, was cut short and is passed over.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from prunetune.core.errors import DataError
from prunetune.core.files import read_json, write_json
from prunetune.model.surgery import Surgery
from prunetune.train.moments import MOMENTS_FILE, Moments

MARKER = "prunetune.json"
MASK_FILE = "mask.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
STATE_FILE = "trainer_state.json"
# What is known of rows under the model as it was (see selection_memory, selection_epoch): it ends with that model.
MEMORY_FILE = "selection.safetensors"
LOSSES_FILE = "selection_losses.json"


def write_marker(folder: Path, facts: Mapping[str, Any]) -> None:
    """Declares a checkpoint complete."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MARKER}
    write_json(folder / MARKER, {**facts, "files": sizes})


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The facts of a complete checkpoint; None if it was cut short."""
    try:
        facts: dict[str, Any] = read_json(folder / MARKER)
        whole = all((folder / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return facts if whole else None


def save_mask(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the mask's state beside the Trainer's files."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / MASK_FILE)


def load_mask(folder: Path) -> dict[str, Tensor]:
    """Reads the mask's state."""
    return load_file(folder / MASK_FILE)


def newest(output_dir: Path, freeze_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, the sliced one that the freeze left included."""
    folders = [*output_dir.glob("checkpoint-*"), freeze_dir / "checkpoint"]
    found = [
        (global_step(folder), bool((read_marker(folder) or {}).get("frozen")), folder)
        for folder in folders
        if read_marker(folder) is not None
    ]
    return max(found)[2] if found else None


def find_checkpoint(resume: str | bool | None, output_dir: Path, freeze_dir: Path, *, plain: bool) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means; None to start afresh.

    Args:
        resume: a folder, True for the newest complete one, or nothing.
        output_dir: the trainer's.
        freeze_dir: where a freeze leaves its folder.
        plain: whether checkpoints of plain TRL are good enough.

    Raises:
        DataError: there is none, or the one given is not complete.
    """
    if not resume:
        return None
    if resume is True:
        found = newest(output_dir, freeze_dir)
        if found is None and plain and output_dir.is_dir():
            last = get_last_checkpoint(str(output_dir))
            found = Path(last) if last else None
        if found is None:
            raise DataError(f"there is no complete checkpoint in {output_dir}; start without resume_from_checkpoint")
        return found
    if not plain and read_marker(Path(resume)) is None:
        raise DataError(
            f"{resume} is not a complete checkpoint of a joint run (it was cut short, or plain TRL wrote it); "
            "resume_from_checkpoint=True takes the newest complete one"
        )
    return Path(resume)


def global_step(folder: Path) -> int:
    """Optimizer steps done when the checkpoint was written."""
    return int(read_json(folder / STATE_FILE)["global_step"])


def slice_checkpoint(source: Path, target: Path, surgery: Surgery) -> None:
    """Copies a checkpoint with its adapter and optimizer state sliced.

    Args:
        source: a complete checkpoint of the dense model.
        target: folder to make.
        surgery: the plan made ready for the dense model.
    """
    changed = (ADAPTER_FILE, MOMENTS_FILE, MARKER, MASK_FILE, MEMORY_FILE, LOSSES_FILE)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*changed))
    adapter = slice_tensors(load_file(source / ADAPTER_FILE), surgery)
    save_file(adapter, target / ADAPTER_FILE, metadata={"format": "pt"})
    Moments.load(source).sliced(surgery).save(target)
    _forget_best(target / STATE_FILE)


def slice_tensors(tensors: Mapping[str, Tensor], surgery: Surgery) -> dict[str, Tensor]:
    """Named tensors of the dense model under their sliced names; those of removed layers are left out."""
    sliced = {}
    for name, tensor in tensors.items():
        new_name, cut = surgery.rename(name), surgery.slice_parameter(name, tensor)
        if new_name is not None and cut is not None:
            sliced[new_name] = cut.contiguous()
    return sliced


def _forget_best(state_file: Path) -> None:
    # A "best" checkpoint from before the freeze does not fit the sliced model.
    state = read_json(state_file)
    state.update(best_metric=None, best_global_step=None, best_model_checkpoint=None)
    write_json(state_file, state)
