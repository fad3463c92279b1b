"""The libraries' own bars and notes, silenced: they would bury what a run prints itself."""

from __future__ import annotations

import logging
import warnings

import datasets
import transformers


def quiet_libraries() -> None:
    """The run draws its own progress; the libraries' bars and notes on their own renamings would bury it."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of every cast in every layer
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\b")
