"""`prunetune merge` and `prunetune delta info`: adapters and tuned models into a base, or what there is to merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunetune.cli.commands._arguments import size_bytes

Folders = Annotated[
    list[Path], typer.Argument(metavar="SOURCES...", help="folders of LoRA adapters or of fine-tuned models")
]
Base = Annotated[str, typer.Option("--base", metavar="BASE", help="the model they were trained on: folder or name")]
Plan = Annotated[
    Path | None, typer.Option("--plan", help="plan.json by which the base was pruned, for adapters of the dense model")
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="file of rows, for methods that look at real inputs")
]

AllowLarge = Annotated[
    bool, typer.Option("--allow-large", help="drop by lot although the changes are so large that it is known to fail")
]

delta = typer.Typer(name="delta", help="What adapters and tuned models changed.", no_args_is_help=True)


def merge(
    sources: Folders,
    base: Base,
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    how: Annotated[
        str, typer.Option("--how", help="linear, average, ties, dare_linear, dare_ties, della, breadcrumbs, ...")
    ] = "linear",
    weights: Annotated[str | None, typer.Option("--weights", help="of each source, e.g. .5,.3,.2; default: 1")] = None,
    method: Annotated[
        str | None, typer.Option("--delta", help="prunes each delta first; see `prunetune list deltas`")
    ] = None,
    drop: Annotated[str | None, typer.Option("--drop", help="share of each delta that is dropped, e.g. 90%")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="further options of the delta method")
    ] = None,
    rescale: Annotated[
        str | None,
        typer.Option(
            "--rescale",
            help="what survivors of random dropping are divided by: auto, closed_form, analytic, search (all need "
            "--calibration), inverse_keep, l1, none, or a number",
        ),
    ] = None,
    judge: Annotated[
        str, typer.Option("--judge", help="a search goes by the loss on the rows' labels, or by changes of the outputs")
    ] = "loss",
    rules: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="'REGEX: KEY=VALUE ...'", help="other weights, drop, ... for some tensors"),
    ] = None,
    output: Annotated[str, typer.Option("--output", help="model, or adapter: a LoRA adapter again")] = "model",
    plan: Plan = None,
    calibration: Calibration = None,
    scale: Annotated[float, typer.Option(help="of the merged delta")] = 1.0,
    keep_zeros: Annotated[
        bool | None,
        typer.Option("--keep-zeros/--fill-zeros", help="of a base pruned entry by entry: what is 0 in it stays 0"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as the base is stored")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="a weights file is at most so large")] = "2GB",
    seed: Annotated[int, typer.Option(min=0, help="of random masks")] = 0,
    quantized: Annotated[
        str | None,
        typer.Option("--quantized", help="nf4, fp4 or int8: how the base was loaded while the sources were trained"),
    ] = None,
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto", help="of a quantised base: dequantized (default, written in bfloat16), original, requantized"
        ),
    ] = None,
    allow_large: AllowLarge = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a former merge there")] = False,
) -> None:
    """Merge adapters or fine-tuned models into a base, streaming: memory does not grow with the model."""
    from prunetune.export.stream_merge import MergeSettings
    from prunetune.pipeline.merge_request import MergeRequest, parse_rule, parse_weights
    from prunetune.pipeline.merge_run import merge_run

    request = MergeRequest(
        sources,
        base,
        how,
        None if weights is None else parse_weights(weights),
        method,
        _options(drop, options),
        plan,
        calibration,
        MergeSettings(
            scale=scale,
            seed=seed,
            dtype=_dtype(dtype),
            shard_size=size_bytes("--shard-size", shard_size),
            keep_zeros=keep_zeros,
        ),
        rescale,
        _one_of("--judge", judge, "loss", "outputs"),
        [parse_rule(rule) for rule in rules or ()],
        _one_of("--output", output, "model", "adapter"),
        allow_large,
        quantized,
        None if onto is None else _one_of("--onto", onto, "dequantized", "original", "requantized"),
    )
    merge_run(request, out, overwrite=overwrite)


@delta.command("info")
def info(
    sources: Folders,
    base: Base,
    plan: Plan = None,
    calibration: Calibration = None,
    each: Annotated[bool, typer.Option("--each", help="a line for every matrix, not medians over layers")] = False,
) -> None:
    """Show how large the changes are, tensor by tensor, and how much of them could be dropped."""
    from prunetune.cli.delta_view import show_info
    from prunetune.export.stream_merge import MergeSettings
    from prunetune.pipeline.merge_request import MergeRequest
    from prunetune.pipeline.merge_run import delta_info

    request = MergeRequest(sources, base, plan=plan, calibration=calibration, settings=MergeSettings())
    show_info(delta_info(request), each)


@delta.command("save")
def save(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="folder of a LoRA adapter or fine-tuned model")],
    base: Base,
    out: Annotated[Path, typer.Option("--out", help="file to write, e.g. tiny.delta")],
    drop: Annotated[str | None, typer.Option("--drop", help="share of the delta that is dropped, e.g. 99%")] = None,
    method: Annotated[
        str | None, typer.Option("--delta", help="what drops it; default: chance, see `prunetune list deltas`")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="further options of the delta method")
    ] = None,
    calibration: Calibration = None,
    dtype: Annotated[str, typer.Option(help="of the stored values: float32, bfloat16 or float16")] = "bfloat16",
    seed: Annotated[int, typer.Option(min=0, help="of the random mask")] = 0,
    allow_large: AllowLarge = False,
) -> None:
    """Store what is left of a pruned delta: values, and their places in whatever takes the fewest bytes."""
    from prunetune.export.stream_merge import MergeSettings
    from prunetune.pipeline.delta_save import save_run
    from prunetune.pipeline.merge_request import MergeRequest

    request = MergeRequest(
        [source],
        base,
        delta=method,
        options=_options(drop, options),
        calibration=calibration,
        settings=MergeSettings(seed=seed, dtype=_dtype(dtype)),
        allow_large=allow_large,
    )
    save_run(request, out)


@delta.command("apply")
def apply(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what `prunetune delta save` wrote")],
    base: Base,
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as the base is stored")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a former merge there")] = False,
) -> None:
    """Add a stored delta to its base; the same as merging the file."""
    from prunetune.export.stream_merge import MergeSettings
    from prunetune.pipeline.merge_request import MergeRequest
    from prunetune.pipeline.merge_run import merge_run

    merge_run(MergeRequest([file], base, settings=MergeSettings(dtype=_dtype(dtype))), out, overwrite=overwrite)


def _options(drop: str | None, options: list[str] | None) -> dict[str, Any]:
    from prunetune.core.errors import ConfigError, Problem

    given: dict[str, Any] = {"drop": drop} if drop is not None else {}
    for option in options or []:
        key, sign, value = option.partition("=")
        if not sign:
            raise ConfigError([Problem(f"{option} is not KEY=VALUE", "--set")])
        given[key] = value
    return given


def _one_of(where: str, value: str, *words: str) -> Any:
    from prunetune.core.errors import ConfigError, Problem

    if value not in words:
        raise ConfigError([Problem(f"{value} is not {' or '.join(words)}", where)])
    return value


def _dtype(name: str | None) -> Any:
    import torch

    from prunetune.core.errors import ConfigError, Problem

    if name is None:
        return None
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError([Problem(f"{name} is not float32, bfloat16 or float16", "--dtype")])
    return getattr(torch, name)
