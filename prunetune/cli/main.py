"""The command line. Commands are thin and import what they need when they run, so that help is instant.

Exit codes: 0 done, 1 failed (message, no traceback), 2 wrong configuration or usage, 130 interrupted, 75 terminated by
a scheduler (SIGTERM) with everything saved: requeue the same command with --resume.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from prunetune import __version__
from prunetune.cli.commands import chat, compare, data, doctor, evaluate, export, listing, merge, plan, prune, train
from prunetune.core.console import is_main_process
from prunetune.core.errors import ConfigError, ProcessLostError, PrunetuneError, TerminatedError
from prunetune.core.files import disk_is_full
from prunetune.core.leaving import with_own_exit_code
from prunetune.core.termination import REQUEUE_EXIT_CODE


class _Commands(TyperGroup):
    """Turns deliberate errors into a message and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        # Merely imported, on a CPU, it asks for a package that nothing here needs.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        except PrunetuneError as error:
            _complain(str(error), everywhere=isinstance(error, ProcessLostError))
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
        except TerminatedError as stop:
            _complain(str(stop))
            raise typer.Exit(REQUEUE_EXIT_CODE) from None
        except KeyboardInterrupt as stop:
            _complain(str(stop) or "interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            # Several libraries write files, each with errors of its own.
            if not disk_is_full(error):
                raise
            _complain(f"the disk is full ({error}); what was finished is whole. Free some space and start again")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="prunetune",
    cls=_Commands,
    help="Fine-tune a language model for a domain and make it smaller in the same run.",
    epilog="Start with: prunetune plan configs/quickstart.yaml, then prunetune train configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("prune")(prune.prune)
app.command("compare")(compare.compare)
app.command("export")(export.export)
app.add_typer(data.app, name="data")
app.command("merge")(merge.merge)
app.add_typer(merge.delta)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("list")(listing.listing)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunetune {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""
    # Threads that wait for each other by spinning stall training many times over when anything else runs on the
    # same cores. It has to be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _complain(text: str, *, everywhere: bool = False) -> None:
    # Every process of a launch meets the same fault; one of them says so, if it is not the one that is gone.
    if everywhere or is_main_process():
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(text)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The whole process's work: a command, and the exit code that it ends with.

    Args:
        arguments: of the command line; None: this process's own.
    """
    with with_own_exit_code():
        app(arguments)


if __name__ == "__main__":
    main()
