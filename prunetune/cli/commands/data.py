"""`prunetune data`: look at rows, score them once, select from the scores, and ask why."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prunetune.core.errors import Problem

app = typer.Typer(
    help="Choose which samples and tokens are worth training on.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="In turn: prunetune data inspect, score, select, then explain, diff and report on what was selected",
)

Rows = Annotated[str, typer.Argument(metavar="ROWS", help="rows: .jsonl, .json, .csv, .parquet, a saved folder, ...")]
Kept = Annotated[Path, typer.Argument(metavar="KEPT", help="folder of a selection")]
Model = Annotated[str, typer.Option("--model", help="model folder or name, e.g. Qwen/Qwen3-0.6B")]
MaxLength = Annotated[int, typer.Option(min=8, help="tokens that rows are cut to, as in the training that follows")]
Q_TUNING, ITS_TOKENS = "q_tuning", "neighbour_perplexity"


class Scope(str, Enum):  # noqa: UP042 - typer shows the values of a (str, Enum)
    """Among which tokens a token is ranked."""

    sample = "sample"
    all = "all"


@app.command("inspect")
def inspect(
    rows: Rows,
    model: Model,
    max_length: MaxLength = 512,
    data_format: Annotated[
        str, typer.Option("--format", help="prompt_completion, messages, alpaca, text, or auto")
    ] = "auto",
    near: Annotated[bool, typer.Option(help="also look for near duplicates")] = True,
) -> None:
    """Show what training would make of rows: trained tokens, lengths, repeats, bad rows."""
    from prunetune.cli.data_view import show_inspection
    from prunetune.pipeline.inspect_run import inspect_run

    show_inspection(inspect_run(rows, model, max_length=max_length, data_format=data_format, near_duplicates=near))


@app.command("score")
def score(
    rows: Rows,
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="folder of scores; a stopped pass goes on there")],
    max_length: MaxLength = 512,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16 on a GPU")] = None,
    reference: Annotated[
        str | None, typer.Option(help="second model for excess losses; base: an adapter folder's base model")
    ] = None,
    extras: Annotated[
        list[str] | None,
        typer.Option("--with", help="further statistics: ifd (answers without prompts), influence (LESS)"),
    ] = None,
    validation: Annotated[str | None, typer.Option(help="rows that influence is about")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="only so many rows, chosen by content")] = None,
    final_answer: Annotated[
        str | None, typer.Option(help="regular expression where final answers begin; those tokens are protected")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of random projections")] = 0,
) -> None:
    """Score every row and token once, in one forward pass, for any number of selections."""
    from prunetune.cli.data_view import show_scores
    from prunetune.data.scorer import DEFAULT_EXTRAS
    from prunetune.pipeline.score_run import score_run

    done = score_run(
        rows,
        model,
        out,
        max_length=max_length,
        dtype=dtype,
        reference=reference,
        extras=(*DEFAULT_EXTRAS, *(extras or [])),
        validation=validation,
        max_rows=max_rows,
        final_answer=final_answer,
        seed=seed,
    )
    if done is not None:
        show_scores(done, out)


@app.command("select")
def select(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="folder of scores")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    method: Annotated[str | None, typer.Option(help="see: prunetune list samples")] = None,
    samples: Annotated[str, typer.Option(help="share of the rows that stays, e.g. 25%")] = "100%",
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="option of the sample method")
    ] = None,
    token_method: Annotated[str | None, typer.Option(help="see: prunetune list tokens")] = None,
    tokens: Annotated[str, typer.Option(help="share of these rows' target tokens that stays, e.g. 70%")] = "100%",
    token_options: Annotated[
        list[str] | None, typer.Option("--token-set", metavar="KEY=VALUE", help="option of the token method")
    ] = None,
    scope: Annotated[Scope, typer.Option(help="rank tokens within each sample, or all together")] = Scope.sample,
    floor: Annotated[str, typer.Option(help="share of its targets that every row keeps at least")] = "10%",
    stratify: Annotated[
        str, typer.Option(help="source, label, length, several with commas: each keeps its share")
    ] = "none",
    minimum: Annotated[int, typer.Option(min=0, help="rows that every stratum keeps, if it has so many")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="of methods that draw by lot")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a former selection there")] = False,
) -> None:
    """Select rows and target tokens from scores, in seconds and without a model."""
    from prunetune.core.console import note
    from prunetune.core.errors import ConfigError

    problems: list[Problem] = []
    settings: dict[str, Any] = {
        "samples_kept": _share("--samples", samples, problems),
        "tokens_kept": _share("--tokens", tokens, problems),
        "floor": _share("--floor", floor, problems),
        "samples_options": _options("--set", options, problems),
        "tokens_options": _options("--token-set", token_options, problems),
    }
    if problems:
        raise ConfigError(problems)
    if token_method is None and method == Q_TUNING and settings["tokens_kept"] < 1:
        token_method = ITS_TOKENS
        note(f"--token-method {ITS_TOKENS}: Q-Tuning's own, as no other was named")

    from prunetune.cli.data_view import show_selection
    from prunetune.data.selection_facts import selection_facts
    from prunetune.pipeline.select_run import select_run

    selection = select_run(
        scores,
        out,
        replace=overwrite,
        samples_method=method,
        tokens_method=token_method,
        scope=scope.value,
        stratify=stratify,
        minimum=minimum,
        seed=seed,
        **settings,
    )
    show_selection(selection_facts(selection), out)


@app.command("explain")
def explain(
    kept: Kept, name: Annotated[str, typer.Option("--id", help="id of a row, or an unambiguous beginning of it")]
) -> None:
    """Say why a row was kept or dropped, and show its text with dropped tokens struck through."""
    from prunetune.cli.data_view import show_explanation
    from prunetune.data.audit import explain as explanation

    show_explanation(explanation(kept, name))


@app.command("diff")
def diff(
    first: Kept,
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="folder of another selection of these rows")],
    rows: Annotated[int, typer.Option(min=0, help="show so many of the changed rows")] = 20,
) -> None:
    """Show what two selections of the same rows decided differently."""
    from prunetune.cli.data_view import show_difference
    from prunetune.data.audit import diff as difference

    show_difference(difference(first, second), str(first), str(second), rows)


@app.command("report")
def report(kept: Kept) -> None:
    """Write report.html of a selection anew."""
    from prunetune.core.console import note
    from prunetune.pipeline.select_run import report_run

    note(f"report: {report_run(kept)}")


def _share(name: str, text: str, problems: list[Problem]) -> float:
    from prunetune.core.errors import Problem
    from prunetune.core.sizes import parse_fraction

    try:
        return parse_fraction(text)
    except ValueError as error:
        problems.append(Problem(str(error), name))
        return 1.0


def _options(name: str, given: list[str] | None, problems: list[Problem]) -> dict[str, Any]:
    """KEY=VALUE pairs; values are read as YAML, as in a configuration."""
    import yaml

    from prunetune.core.errors import Problem

    found: dict[str, Any] = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            problems.append(Problem(f"{text!r} is not KEY=VALUE; write for example {name} variant=loss_ratio", name))
            continue
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            problems.append(Problem(f"{value!r} is no value that YAML can read; quote it", name))
    return found
