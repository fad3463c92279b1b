"""`prunetune data inspect`: a model's name to its tokenizer, then a look at the rows."""

from __future__ import annotations

from typing import Any

from prunetune.data.inspection import Inspection, inspect
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_tokenizer


def inspect_run(data: str, model: str, **settings: Any) -> Inspection:
    """Looks at rows as training with this model would see them.

    Args:
        data: a file, saved datasets folder or hub id.
        model: a model folder or name; only its tokenizer is read.
        settings: see ``prunetune.data.inspection.inspect``.

    Raises:
        DataError: see ``inspect``. UnsupportedModelError: the model is not found.
    """
    return inspect(data, load_tokenizer(resolve_model(model)), **settings)
