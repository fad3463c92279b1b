"""prunetune: fine-tune a language model for a domain and make it smaller in the same run.

The layers, top to bottom; imports point down only:
cli > pipeline > data, train, export, evaluate, report > methods > model > config > core.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Names of the public interface and where they live; loaded on first use so that the command line starts
# without importing torch.
_PUBLIC = {
    "PruneConfig": "prunetune.config.schema",
    "PruneTuneTrainer": "prunetune.pipeline.trainer",
    "Plan": "prunetune.model.plan",
    "SelectionConfig": "prunetune.config.schema",
}
__all__ = ["Plan", "PruneConfig", "PruneTuneTrainer", "SelectionConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'prunetune' has no attribute {name!r}")
