"""A selection as a folder: rows to train on, what was decided about each, and facts about the whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from prunetune.core.errors import DataError
from prunetune.core.files import new_folder, write_json
from prunetune.data.selection import Selection
from prunetune.data.selection_audit import AUDIT, TOKENS, audit_rows, token_rows
from prunetune.data.selection_facts import FACTS, selection_facts

DATASET, TOKENIZER = "dataset", "tokenizer.json"


def write_selection(
    selection: Selection,
    folder: Path | str,
    *,
    replace: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> None:
    """Writes a selection: ``dataset/`` for ``datasets.load_from_disk``, its audit, and facts in selection.json.

    Args:
        selection: what to write.
        folder: where to; nothing is left there if writing fails.
        replace: overwrite a selection there.
        finish: called with the folder before it gets its name, to add what belongs into it.

    Raises:
        DataError: ``folder`` exists, and ``replace`` is false or it holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not replace:
        raise DataError(f"{folder} exists; name another folder, or ask to overwrite the selection there")
    if folder.exists() and not (folder / FACTS).is_file():
        raise DataError(f"{folder} holds no selection, so it is not overwritten; name another folder")
    with new_folder(folder, replace=replace) as temporary:
        selection.dataset().save_to_disk(str(temporary / DATASET))
        pq.write_table(audit_rows(selection), temporary / AUDIT, compression="zstd")
        pq.write_table(token_rows(selection), temporary / TOKENS, compression="zstd")
        tokenizer = tokenizer_file(selection.scores.header.get("tokenizer"))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
        write_json(temporary / FACTS, selection_facts(selection))
        if finish is not None:
            finish(temporary)


def tokenizer_file(name: str | None) -> Path | None:
    """The tokenizer.json of a folder, or of a hub name that is in the local cache; None if there is neither."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name:
        return None
    if Path(name).is_dir():
        return Path(name) / TOKENIZER if (Path(name) / TOKENIZER).is_file() else None
    try:
        found = try_to_load_from_cache(name, TOKENIZER)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
