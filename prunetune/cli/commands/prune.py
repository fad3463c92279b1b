"""`prunetune prune`: a smaller model in one shot, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunetune.cli.commands._arguments import size_bytes


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="the model to prune: folder or name")],
    target: Annotated[str, typer.Option("--target", help="what stays: 70% of the decoder, 90M parameters, or 180MB")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    score: Annotated[str, typer.Option("--score", help="ranks units; see `prunetune list scores`")] = "wanda",
    allocation: Annotated[
        str, typer.Option("--allocation", help="spreads the budget; see `prunetune list allocation`")
    ] = "uniform",
    compensation: Annotated[
        str, typer.Option("--compensation", help="what the weights that stay do; see `prunetune list compensation`")
    ] = "refit",
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="file of rows, for methods that look at real inputs")
    ] = None,
    units: Annotated[
        list[str] | None, typer.Option("--units", help="what may leave; default: what the score ranks")
    ] = None,
    align: Annotated[int, typer.Option(help="MLP widths are multiples of this")] = 64,
    tokens: Annotated[int, typer.Option(help="calibration tokens")] = 16384,
    judge_tokens: Annotated[int, typer.Option(help="kept apart for methods that try cuts out")] = 2048,
    max_length: Annotated[int, typer.Option(help="rows are cut to so many tokens")] = 512,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a method's own option, e.g. compensation.ridge=0.05"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16 or float16")] = "bfloat16",
    shard_size: Annotated[str, typer.Option(help="a weights file is at most so large")] = "1GB",
    cache: Annotated[
        Path | None, typer.Option("--cache", help="where statistics are kept; default: prune-cache beside --out")
    ] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="prove the folder in a fresh process, which loads it whole")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export there")] = False,
) -> None:
    """Prune a model in one shot: score, allocate, compensate, write. No training; one layer in memory at a time."""
    from prunetune.pipeline.prune_request import PruneRequest
    from prunetune.pipeline.prune_run import prune_once

    request = PruneRequest(
        model=model,
        out=out,
        target=_target(target, units, align, score),
        score=score,
        allocation=allocation,
        compensation=compensation,
        options=_options(options or []),
        calibration=calibration,
        tokens=tokens,
        judge_tokens=judge_tokens,
        max_length=max_length,
        dtype=dtype,
        shard_size=size_bytes("--shard-size", shard_size),
        seed=seed,
        cache=cache,
        replace=overwrite,
        verify=verify,
    )
    prune_once(request)


def _target(text: str, units: list[str] | None, align: int, score: str) -> Any:
    """The budget from one word: a fraction, a number of parameters, or a size in bytes."""
    from pydantic import ValidationError

    from prunetune.config.schema import TargetConfig
    from prunetune.core.errors import ConfigError, Problem
    from prunetune.pipeline.prune_request import default_units

    field = "size" if text.lower().endswith("b") and not text[:-1].replace(".", "").isdigit() else "kept"
    if field == "kept" and text[-1:].lower() in ("k", "m", "b"):
        field = "params"
    kinds = tuple(kind for word in units for kind in word.split(",")) if units else default_units(score)
    try:
        return TargetConfig(**{field: text}, units=kinds, align=align)
    except ValidationError as error:
        faults = [(str(fault["loc"][0]), fault) for fault in error.errors()]
        hint = f"{text} is no budget; write for example 70% (of the decoder), 90M (parameters) or 180MB"
        raise ConfigError(
            [
                Problem(hint, "--target")
                if where == field
                else Problem(f"{fault['msg']} (set: {fault['input']})", f"--{where}")
                for where, fault in faults
            ]
        ) from None


def _options(words: list[str]) -> dict[str, dict[str, str]]:
    """section -> option -> value, from ``section.option=value``."""
    from prunetune.core.errors import ConfigError, Problem

    found: dict[str, dict[str, str]] = {"score": {}, "allocation": {}, "compensation": {}}
    for word in words:
        path, sign, value = word.partition("=")
        section, _, key = path.partition(".")
        if not sign or section not in found or not key:
            raise ConfigError([Problem(f"{word} is not SECTION.KEY=VALUE with {', '.join(found)}", "--set")])
        found[section][key] = value
    return found
