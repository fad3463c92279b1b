"""Writing an ordinary model folder: merged weights, config, tokenizer, plan; checked before it takes its name.

Merging is in merge.py, the check against the live model in verify.py.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from prunetune.core.console import note
from prunetune.core.errors import ExportError, UnsupportedModelError
from prunetune.core.files import disk_is_full, free_bytes, new_folder, write_json
from prunetune.core.records import ExportedModel
from prunetune.core.sizes import format_bytes
from prunetune.export.merge import merged_tensors, ties_hold, untied_sources
from prunetune.export.merge_base import merged_onto, merging_onto, trained_logits
from prunetune.export.verify import prompts_for, verify_export
from prunetune.model.shards import ShardReader, ShardWriter
from prunetune.model.source import SourceWeights
from prunetune.model.surgery import base_model

METADATA_FILE = "prunetune.json"
PLAN_FILE = "plan.json"
# Tokenizer, config and card beside the weights; large vocabularies have 30 MB of tokenizer.
_MARGIN_BYTES = 64 * 10**6


class SavesItself(Protocol):
    """A plan: anything that writes itself to a file."""

    def save(self, path: Path) -> None:
        """Writes to ``path``."""


def export_model(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: str | torch.dtype = "bfloat16",
    shard_size: int = 5 * 10**9,
    plan: SavesItself | None = None,
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
    verify: bool = True,
    source: SourceWeights | None = None,
) -> ExportedModel:
    """Writes the live model as a folder that stock transformers opens, and proves that it is the same model.

    Args:
        model: a PeftModel with unmerged adapters or a plain model, already sliced if it is to be; not changed.
        tokenizer: saved beside the weights with its chat template; None writes none.
        folder: must not exist, unless ``replace``; takes its new content only after the check passed.
        dtype: of the weights: float32, bfloat16 or float16.
        shard_size: a weights file is at most so many bytes.
        plan: saved as plan.json.
        metadata: anything JSON, kept in prunetune.json.
        replace: an earlier export (or empty folder) at ``folder`` is replaced.
        verify: reload in a fresh process and compare (verify.py).
        source: of a quantised model, the weights to merge onto; default: the dequantised ones (merge_base.py).

    Raises:
        ExportError: the folder exists, no space, or the check failed; what stood there is untouched.
        UnsupportedModelError: a base quantised by others than bitsandbytes, a custom class, an adapter that has no
            exact merge.

    Example:
        >>> export_model(trainer.model, tokenizer, Path("compact"), dtype="bfloat16")    # doctest: +SKIP
    """
    folder, kind, base = Path(folder), weights_dtype(dtype), merged_onto(model, source)
    refuse_existing(folder, replace)
    trained = trained_logits(model, prompts_for(model, tokenizer)[0]) if verify else None
    verification: dict[str, Any] = {}
    with merging_onto(model, source):
        parts = untied_sources(model)
        config = export_config(model, kind)
        probe(config, {part.name: tuple(part.shape) for part in parts})
        needed = sum(math.prod(part.shape) for part in parts) * kind.itemsize
        require_space(folder, needed)
        with writing(folder), new_folder(folder, replace=replace) as temporary:
            ShardWriter(temporary, shard_size).write(merged_tensors(model, kind))
            _write_beside(model, tokenizer, config, temporary)
            if plan is not None:
                plan.save(temporary / PLAN_FILE)
            if verify:
                verification = verify_export(model, tokenizer, temporary, kind, trained)
            metadata = {**(metadata or {}), **({"merged_onto": base} if base else {})}
            facts = export_facts(temporary, config, kind, metadata, verification)
            write_json(temporary / METADATA_FILE, facts)
    note(f"exported {format_bytes(needed)} of weights to {folder}{f'; merged onto {base}' if base else ''}")
    return ExportedModel(folder, verification)


def weights_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype by name; raises ExportError for one that weights are not written in."""
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise ExportError(f"export.dtype is {dtype}; weights are written as float32, bfloat16 or float16")
    return kind


def refuse_existing(folder: Path, replace: bool) -> None:
    """Raises ExportError unless the folder is free, or an earlier export that may be replaced."""
    if not folder.exists():
        return
    if not replace:
        raise ExportError(f"{folder} exists; choose another folder, or allow replacing it (replace=True)")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / METADATA_FILE).is_file()):
        raise ExportError(
            f"{folder} exists and holds something else than an export (no {METADATA_FILE}); choose another folder"
        )


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises ExportError unless the disk has room for so many bytes of weights."""
    free, needed = free_bytes(folder), needed_bytes + _MARGIN_BYTES
    if free < needed:
        raise ExportError(
            f"the export to {folder} needs {format_bytes(needed)}, but the disk has {format_bytes(free)} free; "
            "free some space, choose a folder on another disk, or a smaller export.dtype. Nothing was written."
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the disk says into an ExportError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = disk_is_full(error)
        reason = "the disk is full" if full else f"writing failed ({error})"
        advice = "free some space or choose a folder on another disk" if full else "check the folder's disk and rights"
        raise ExportError(
            f"the export to {folder} was given up: {reason}; {advice}. "
            "The partial files were removed and nothing that stood there was changed."
        ) from error


def export_config(model: nn.Module, dtype: torch.dtype) -> Any:
    """The live model's config as the exported folder states it: stock class, explicit head_dim, no traces."""
    base = base_model(model)
    name = type(base).__name__
    if getattr(transformers, name, None) is not type(base):
        raise UnsupportedModelError(
            f"{type(base).__module__}.{name} is no stock transformers class, so its export would not open without "
            "remote code; load the base with trust_remote_code=False"
        )
    config = copy.deepcopy(base.config)
    for trace in ("quantization_config", "auto_map", "_model_name_or_path"):
        if hasattr(config, trace):
            delattr(config, trace)
    config._name_or_path = ""
    config.architectures = [name]
    config.dtype = dtype
    config.use_cache = True  # training turns it off
    if getattr(config, "head_dim", None) is None and hasattr(config, "num_attention_heads"):
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.tie_word_embeddings = ties_hold(model)
    return config


def probe(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Builds the stock class that ``config`` names on the meta device and compares every name and shape.

    Raises:
        ExportError: lists what differs; such a folder would load with fresh random weights, or not at all.
    """
    try:
        # Through a dictionary, as from a file: configs check their values only when they are made.
        reread = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(reread, trust_remote_code=False)
    except (ValueError, StrictDataclassError) as error:
        raise ExportError(f"transformers {version('transformers')} refuses the exported config: {error}") from error
    tied = set(getattr(plain, "all_tied_weights_keys", None) or {})
    wanted = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items() if name not in tied}
    if type(plain).__name__ != config.architectures[0]:
        raise ExportError(f"the config opens as {type(plain).__name__}, but the model is {config.architectures[0]}")
    faults = [
        f"{name}: config says {wanted.get(name, 'no such tensor')}, the model has {shapes.get(name, 'none')}"
        for name in sorted(wanted.keys() | shapes.keys())
        if wanted.get(name) != shapes.get(name)
    ]
    if faults:
        shown = "\n".join(f"  - {fault}" for fault in faults[:8])
        raise ExportError(
            f"{len(faults)} tensors do not fit the config, so stock transformers could not open the export:\n{shown}"
        )


def _write_beside(model: nn.Module, tokenizer: Any, config: Any, folder: Path) -> None:
    """Config, generation config, tokenizer and chat template."""
    config.save_pretrained(folder)
    generation = copy.deepcopy(getattr(base_model(model), "generation_config", None))
    if generation is not None:
        generation._from_model_config = False
        generation.use_cache = True
        if generation.pad_token_id is None and tokenizer is not None:
            generation.pad_token_id = tokenizer.pad_token_id
        _save_generation(generation, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_generation(generation: Any, folder: Path) -> None:
    try:
        generation.save_pretrained(folder)
    except ValueError:
        # Some published models state a temperature beside greedy decoding, which saving refuses: they mean sampling.
        generation.do_sample = True
        generation.save_pretrained(folder)


def export_facts(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    metadata: Mapping[str, Any] | None,
    verification: dict[str, Any],
) -> dict[str, Any]:
    """What prunetune.json says about a written folder."""
    entries = ShardReader(folder).entries.values()
    packages = ("prunetune", "torch", "transformers", "peft", "safetensors")
    return {
        "format": "prunetune-export",
        "parameters": sum(math.prod(entry.shape) for entry in entries),
        "weights_bytes": sum(entry.size_bytes for entry in entries),
        "dtype": str(dtype).removeprefix("torch."),
        "tied_embeddings": bool(config.tie_word_embeddings),
        "versions": {name: _version(name) for name in packages},
        "metadata": dict(metadata or {}),
        "verification": verification,
    }


def _version(package: str) -> str:
    if package == "prunetune":
        from prunetune import __version__

        return __version__
    return version(package)
