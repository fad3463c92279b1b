"""What joint training costs: search- and recover-phase steps against plain TRL LoRA steps, time and peak memory.

    python scripts/bench/step_time.py --model smollm2-135m --out step_time.json

Time: the three kinds of step take turns on the same batches in one process; ratios are medians over turns with
quartiles. Memory: each kind runs alone in a fresh process. The recover ratio is held against its share of the plain
step's matrix FLOPs, which torch counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
from _common import report, settle, spread
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from prunetune.config.schema import RunConfig
from prunetune.core.streams import stream
from prunetune.evaluate.memory import peak_resident_bytes
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.train.settings import lora_config, sft_config

KINDS = ("plain", "search", "recover")


def main() -> None:
    options = parse()
    if options.only:
        step = stepper(options.only, options)
        for _ in range(options.repeats):
            step()
        print(json.dumps({"peak_bytes": peak_bytes()}))
        return
    times, share = measure_times(options)
    memory = {kind: measure_memory(kind, options) for kind in KINDS}
    result = {
        "model": options.model,
        "batch": options.batch,
        "length": options.length,
        "kept": options.kept,
        "threads": torch.get_num_threads(),
        "search_over_plain": spread(ratios(times["search"], times["plain"])),
        "recover_over_plain": spread(ratios(times["recover"], times["plain"])),
        "recover_flop_share": round(share, 4),
        "peak_bytes": memory,
        "search_memory_over_plain": round(memory["search"] / memory["plain"], 4),
        "recover_memory_over_plain": round(memory["recover"] / memory["plain"], 4),
    }
    report(result, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--kept", default="60%")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--only", choices=KINDS, help="run one kind alone and print its peak memory")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def stepper(kind: str, options: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one whole optimizer step and returns its seconds."""
    trainer = build(kind, options)
    trainer.model = trainer.accelerator.prepare_model(trainer.model)  # bfloat16 arithmetic, as in train()
    trainer.create_optimizer()
    trainer.model.train()
    if kind == "search":
        trainer.state.max_steps = 1000
        trainer.begin_leg(trainer.state)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(options.batch)]))
    items = (batch["labels"][:, 1:] != -100).sum()
    # Past the warm-up, so that gates move and the planner decides in every step.
    state = {"step": 200}

    def step() -> float:
        start = time.perf_counter()
        trainer.begin_step(state["step"])
        trainer.training_step(trainer.model, dict(batch), num_items_in_batch=items)
        trainer.before_optimizer_step(state["step"])
        trainer.optimizer.step()
        trainer.model.zero_grad()
        state["step"] += 1
        settle()
        return time.perf_counter() - start

    return step


def build(kind: str, options: argparse.Namespace) -> PruneTuneTrainer:
    config = RunConfig(
        model={"name": options.model},
        target=options.kept,
        mask="random" if kind == "recover" else "saliency",
        compensation="none",
        train={
            "batch_size": options.batch,
            "max_length": options.length,
            "activation_checkpointing": options.checkpointing,
        },
    )
    prepared = resolve_model(options.model)
    tokenizer = load_tokenizer(prepared)
    words = stream(0, "bench").integers(100, len(tokenizer) - 100, (options.batch, options.length))
    rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in words])
    scratch = tempfile.mkdtemp()
    trainer = PruneTuneTrainer(
        model=load_base(prepared, config.model.dtype),
        args=sft_config(config, Path(scratch), 1000),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(config),
        prune=None if kind == "plain" else config.prune(),
    )
    if kind == "recover":
        scores = {site.name: torch.rand(site.size) for site in trainer.planner.sites if site.kind == "mlp_channels"}
        trainer.cut_from_scores(scores)
    return trainer


def measure_times(options: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """(kind -> seconds of each turn, a recover step's matrix FLOPs over a plain step's, backward included)."""
    steppers = {kind: stepper(kind, options) for kind in KINDS}
    flops = {}
    for kind, step in steppers.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[kind] = counter.get_total_flops()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.repeats):
        for kind, step in steppers.items():
            times[kind].append(step())
    return times, flops["recover"] / flops["plain"]


def measure_memory(kind: str, options: argparse.Namespace) -> int:
    """Peak bytes of a fresh process that takes steps of one kind."""
    command = [sys.executable, __file__, "--model", options.model, "--only", kind, "--repeats", "3"]
    command += ["--batch", str(options.batch), "--length", str(options.length), "--kept", options.kept]
    command += ["--checkpointing"] if options.checkpointing else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Of each turn."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def peak_bytes() -> int:
    """Of this process (resident set), or of the GPU's allocator."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


if __name__ == "__main__":
    main()
