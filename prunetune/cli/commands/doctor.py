"""`prunetune doctor`: is this machine ready, and what to do if not."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Check versions, memory, disk, devices and arithmetic of this machine."""
    from rich.markup import escape

    from prunetune.cli.diagnosis import Level, diagnose
    from prunetune.core.console import console

    marks = {Level.ok: "[green]ok  [/green]", Level.warn: "[yellow]warn[/yellow]", Level.fail: "[red]fail[/red]"}
    worst = Level.ok
    for finding in diagnose():
        advice = f" [bold]->[/bold] {escape(finding.advice)}" if finding.advice else ""
        text = f"{marks[finding.level]} {escape(finding.name):<14} {escape(finding.found)}{advice}"
        console().print(text, soft_wrap=True)
        worst = max(worst, finding.level)
    if worst is Level.fail:
        raise typer.Exit(1)
