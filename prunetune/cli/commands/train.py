"""`prunetune train`: the whole run, from data to the compact model and its report."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from prunetune.cli.commands._arguments import ConfigFile, Overrides, read_run
from prunetune.cli.launching import launch


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in its folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete a former run in its folder")] = False,
    engine: Annotated[
        str | None,
        typer.Option("--launch", metavar="ENGINE", help="start several processes: ddp, zero2, zero3 or fsdp2"),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="how many; default: one per GPU, or two on a CPU")
    ] = None,
) -> None:
    """Fine-tune and prune in one run, then export, verify and compare."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run and --overwrite deletes it; choose one")
    if processes is not None and engine is None:
        raise typer.BadParameter("--processes says how many --launch starts; give both")
    run_config = read_run(config, overrides)
    if engine is not None:
        flags = ["--resume"] * resume + ["--overwrite"] * overwrite
        raise typer.Exit(launch(engine, processes, ["train", str(config), *(overrides or []), *flags]))
    _use_one_gpu()

    from prunetune.pipeline.run import run

    run(run_config, resume=resume, overwrite=overwrite)


def _use_one_gpu() -> None:
    """Without a launcher one process would see several GPUs, which TRL refuses; the first one is taken."""
    if "WORLD_SIZE" in os.environ or "CUDA_VISIBLE_DEVICES" in os.environ:
        return
    import torch

    from prunetune.core.console import note

    count = torch.cuda.device_count()
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        note(f"one of {count} GPUs is used; for all of them add --launch ddp (or zero2, zero3, fsdp2)")
