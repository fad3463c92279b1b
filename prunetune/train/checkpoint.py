"""Checkpoints that carry the joint state, are complete or not there, and can be sliced.

A checkpoint is the Trainer's folder plus ``mask.safetensors`` and, written last, ``prunetune.json`` with the size and
digest of every file: a folder without it, or with a file of another size, was cut short; one with other bytes is
damaged. Both are passed over. The freeze folder has such a marker too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from prunetune.core.console import warn
from prunetune.core.errors import DataError
from prunetune.core.files import read_json, sha256, sweep, sync, write_json
from prunetune.model.fold import Fold, fold_tensors
from prunetune.model.ranks import Ranks
from prunetune.model.surgery import Surgery
from prunetune.model.tuned import ADAPTER_CONFIG
from prunetune.train.moments import MOMENTS_FILE, Moments

MARKER = "prunetune.json"
MASK_FILE = "mask.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
STATE_FILE = "trainer_state.json"
# What is known of rows under the model as it was (see selection_memory, selection_epoch): it ends with that model.
MEMORY_FILE = "selection.safetensors"
LOSSES_FILE = "selection_losses.json"


def write_marker(folder: Path, facts: Mapping[str, Any]) -> None:
    """Declares a folder complete, once everything in it is on the disk."""
    (folder / MARKER).unlink(missing_ok=True)
    sweep(folder)
    sync(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    value = {
        **{name: fact for name, fact in facts.items() if name != "digest"},
        "files": {name: path.stat().st_size for name, path in files.items()},
        "sha256": {name: sha256(path) for name, path in files.items()},
    }
    write_json(folder / MARKER, {**value, "digest": _digest(value)})


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The facts of a complete folder, sizes checked; None if it was cut short. See ``damage`` for the bytes."""
    try:
        facts: dict[str, Any] = read_json(folder / MARKER)
        whole = all((folder / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if whole else None


def damage(folder: Path) -> list[str]:
    """Names of the files in a marked folder that are not as they were written; none where there is no marker."""
    if not (folder / MARKER).is_file():
        return []
    try:
        facts = read_json(folder / MARKER)
        if facts["digest"] != _digest({key: value for key, value in facts.items() if key != "digest"}):
            return [MARKER]
        found = {name: folder / name for name in facts["sha256"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [MARKER]
    return [name for name, path in found.items() if not path.is_file() or sha256(path) != facts["sha256"][name]]


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_mask(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the mask's state beside the Trainer's files."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / MASK_FILE)


def load_mask(folder: Path) -> dict[str, Tensor]:
    """Reads the mask's state."""
    return load_file(folder / MASK_FILE)


def newest(output_dir: Path, freeze_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run by its step, the sliced one that the freeze left included.

    Damaged ones are named in a warning and passed over. Those from after the freeze need its folder.
    """
    folders = [folder for folder in (*output_dir.glob("checkpoint-*"), freeze_dir / "checkpoint") if folder.is_dir()]
    markers = {folder: read_marker(folder) for folder in folders}
    spoilt = {folder: names for folder in folders if (names := damage(folder))}
    lost = bool(names := damage(freeze_dir)) and any(not name.startswith("checkpoint/") for name in names)
    for folder, bad in (spoilt | ({freeze_dir: names} if lost else {})).items():
        warn(f"{folder} is damaged and passed over: {', '.join(bad)} changed after it was written")
    found = [
        (global_step(folder), frozen, folder)
        for folder, marker in markers.items()
        if marker is not None and folder not in spoilt
        for frozen in [bool(marker.get("frozen"))]
        if not (frozen and lost)
    ]
    return max(found)[2] if found else None


def rotate(output_dir: Path, limit: int | None, step: int, best: str | None) -> None:
    """Deletes the oldest checkpoints until ``limit`` are left.

    Those of later steps than ``step``, the one just written, are from a former run and so the oldest: the clock, which
    may have been set back meanwhile, is not asked.
    """
    steps = {path: int(name) for path in output_dir.glob("checkpoint-*") if (name := path.name[11:]).isdigit()}
    protected = {output_dir / f"checkpoint-{step}", *([Path(best)] if best else [])}
    surplus = len(steps) - max(limit, len(protected)) if limit and limit > 0 else 0
    oldest_first = sorted(steps, key=lambda path: (steps[path] <= step, steps[path]))
    for path in [path for path in oldest_first if path not in protected][: max(0, surplus)]:
        # Half a folder must not pass for whole.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


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
    if spoilt := damage(Path(resume)):
        raise DataError(
            f"{resume} is damaged: {', '.join(spoilt)} changed after it was written. resume_from_checkpoint=True takes "
            "the newest whole one"
        )
    return Path(resume)


def global_step(folder: Path) -> int:
    """Optimizer steps done when the checkpoint was written."""
    return int(read_json(folder / STATE_FILE)["global_step"])


def slice_checkpoint(
    source: Path,
    target: Path,
    surgery: Surgery,
    folds: Mapping[str, Fold] | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Copies a checkpoint with its adapter and optimizer state sliced.

    Args:
        source: a complete checkpoint of the dense model.
        target: folder to make.
        surgery: the plan made ready for the dense model.
        folds: maps behind linears that become part of the adapters, before these are sliced.
        ranks: of the sliced adapters, if they change.
    """
    changed = (ADAPTER_FILE, MOMENTS_FILE, MARKER, MASK_FILE, MEMORY_FILE, LOSSES_FILE)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*changed))
    adapter = slice_tensors(fold_tensors(load_file(source / ADAPTER_FILE), folds or {}), surgery)
    moments = Moments.load(source).sliced(surgery)
    if ranks is not None:
        adapter = {
            name: ranks.resize(name, tensor, draw=True).contiguous()
            for name, tensor in adapter.items()
            if not ranks.leaves(name)
        }
        moments = moments.resized(ranks)
        write_json(target / ADAPTER_CONFIG, read_json(target / ADAPTER_CONFIG) | ranks.config_fields())
    save_file(adapter, target / ADAPTER_FILE, metadata={"format": "pt"})
    moments.save(target)
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
