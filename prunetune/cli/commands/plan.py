"""`prunetune plan`: what a run would do, without doing it."""

from __future__ import annotations

from prunetune.cli.commands._arguments import ConfigFile, Overrides, read_run


def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show sizes, memory, FLOPs, steps and warnings of a run; nothing is loaded or written."""
    run = read_run(config, overrides)

    from prunetune.cli.plan_view import show_plan
    from prunetune.pipeline.plan_run import plan_run

    show_plan(plan_run(run))
