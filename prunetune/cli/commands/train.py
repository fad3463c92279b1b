"""`prunetune train`: the whole run, from data to the compact model and its report."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from prunetune.cli.commands._arguments import ConfigFile, Overrides, read_run


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in its folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete a former run in its folder")] = False,
) -> None:
    """Fine-tune and prune in one run, then export, verify and compare."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run and --overwrite deletes it; choose one")
    run_config = read_run(config, overrides)
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
        note(
            f"one of {count} GPUs is used; for all of them: "
            f"accelerate launch --multi_gpu --num_processes {count} scripts/train.py CONFIG"
        )
