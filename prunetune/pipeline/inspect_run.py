"""`prunetune data inspect`: a model's name to its tokenizer, then a look at the rows."""

from __future__ import annotations

from typing import Any

from prunetune.data.inspection import Inspection, inspect
from prunetune.model.resolve import resolve_model


def inspect_run(data: str, model: str, **settings: Any) -> Inspection:
    """Looks at rows as training with this model would see them.

    Args:
        data: a file, saved datasets folder or hub id.
        model: a model folder or name; only its tokenizer is read.
        settings: see ``prunetune.data.inspection.inspect``.

    Raises:
        DataError: see ``inspect``. UnsupportedModelError: the model is not found.
    """
    from transformers import AutoTokenizer

    return inspect(data, AutoTokenizer.from_pretrained(resolve_model(model).folder), **settings)
