"""What a person sees: one rich console on the main process, silent on the others."""

from __future__ import annotations

import os
from functools import cache

from rich.console import Console


def is_main_process() -> bool:
    """True on the first process of a launch (also before torch.distributed is up)."""
    return int(os.environ.get("RANK", "0")) == 0


@cache
def console() -> Console:
    """The console for tables, notes and warnings."""
    return Console(quiet=not is_main_process(), highlight=False)


def note(text: str) -> None:
    """One line of information."""
    console().print(f"[dim]·[/dim] {text}")


def warn(text: str) -> None:
    """One line of warning."""
    console().print(f"[yellow]![/yellow] {text}")
