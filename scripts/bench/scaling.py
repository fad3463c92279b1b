"""What joint training adds under every engine: step time and memory against plain TRL LoRA under the same engine.

    python scripts/bench/scaling.py --model smollm2-135m --engines single ddp zero2 zero3 --out scaling.json

For every engine and number of processes the joint run (search phase) and the plain one take turns, each in fresh
processes; ratios of median step times and of peak memory are paired by turn and given with their spread. On a CPU, and
wherever processes share a device, times of more processes say nothing about speed: only the ratios do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
import yaml
from _common import settle, spread
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from prunetune import PruneConfig, PruneTuneTrainer
from prunetune.config.engines import ENGINES, launch_settings
from prunetune.config.schema import TargetConfig
from prunetune.core.files import write_json
from prunetune.core.streams import stream
from prunetune.evaluate.memory import peak_resident_bytes
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_for_training, load_tokenizer

KINDS = ("plain", "joint")
# The first steps make buffers and, under ZeRO-3, a trace of what is needed when.
SETTLING_STEPS = 3


def main() -> None:
    options = parse()
    if options.only:
        measure_here(options)
        return
    results = []
    for engine in options.engines:
        for processes in [1] if engine == "single" else options.processes:
            results.append(compare(engine, processes, options))
            print(json.dumps(results[-1]), flush=True)
    found = {
        "model": options.model,
        "batch": options.batch,
        "length": options.length,
        "steps": options.steps,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "results": results,
    }
    print(json.dumps(found, indent=2))
    if options.out:
        write_json(options.out, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=["single", "ddp", "zero2", "zero3"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=2, help="rows of each process")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--kept", default="60%")
    parser.add_argument("--align", type=int, default=64, help="MLP widths are multiples of it; 8 for tiny models")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of the base")
    parser.add_argument("--only", choices=KINDS, help="one run alone, in this process; prints what it took")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def compare(engine: str, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Turns of both kinds under one engine."""
    turns = [{kind: measure(kind, engine, processes, options) for kind in KINDS} for _ in range(options.turns)]

    def ratios(what: str) -> dict[str, float]:
        return spread([turn["joint"][what] / turn["plain"][what] for turn in turns])

    return {
        "engine": engine,
        "processes": processes,
        "step_over_plain": ratios("step_seconds"),
        "memory_over_plain": ratios("peak_bytes"),
        "plain_step_seconds": round(median(turn["plain"]["step_seconds"] for turn in turns), 4),
        "plain_peak_bytes": int(median(turn["plain"]["peak_bytes"] for turn in turns)),
    }


def measure(kind: str, engine: str, processes: int, options: argparse.Namespace) -> dict[str, float]:
    """One run of a kind in fresh processes; the slowest process's step and the largest one's memory."""
    own = [str(Path(__file__)), "--only", kind, "--model", options.model, "--dtype", options.dtype]
    own += [f"--{name}={getattr(options, name)}" for name in ("batch", "length", "steps", "kept", "align")]
    command, environment = [sys.executable, *own], dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        if engine != "single":
            cpu = not torch.cuda.is_available()
            file = Path(folder) / "launch.yaml"
            file.write_text(yaml.safe_dump(launch_settings(engine, processes, cpu=cpu)))
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
            command = [*launcher, "--main_process_port", "0", *own]
            environment |= {"DS_ACCELERATOR": "cpu"} if cpu else {}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step_seconds"')]
    if done.returncode or len(found) != processes:
        sys.exit(f"{kind} under {engine} in {processes} processes failed:\n{done.stderr[-3000:]}")
    if any(entry["processes"] != processes for entry in found):
        sys.exit(f"{engine} was to run in {processes} processes, but ran as {found}")
    return {name: max(entry[name] for entry in found) for name in ("step_seconds", "peak_bytes")}


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settle()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settle()
        self.seconds.append(time.perf_counter() - self._began)


def measure_here(options: argparse.Namespace) -> None:
    """Trains in this process and prints what a step took."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(options, folder, clock)
        trainer.train()
    steps = clock.seconds[SETTLING_STEPS : SETTLING_STEPS + options.steps]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()
    # One call, so that the lines of several processes do not mix.
    facts = {"step_seconds": median(steps), "peak_bytes": peak, "processes": trainer.accelerator.num_processes}
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def build(options: argparse.Namespace, folder: str, clock: Clock) -> SFTTrainer:
    """The trainer of the kind that was asked for; the joint one stops before its freeze."""
    count = SETTLING_STEPS + options.steps
    cpu = not torch.cuda.is_available()
    # Half of the joint run's steps are search; a callback ends it there.
    args = SFTConfig(
        output_dir=folder,
        max_steps=count if options.only == "plain" else 10 * count,
        per_device_train_batch_size=options.batch,
        max_length=options.length,
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        bf16=options.dtype == "bfloat16",
        activation_checkpointing=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    prepared = resolve_model(options.model)
    tokenizer = load_tokenizer(prepared)
    shape = (8 * options.batch, options.length)
    words = stream(0, "bench").integers(5, len(tokenizer) - 5, shape)
    rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in words])
    common: dict[str, Any] = {
        "model": load_for_training(prepared, options.dtype),
        "args": args,
        "train_dataset": rows,
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=16, target_modules="all-linear"),
    }
    if options.only == "plain":
        return SFTTrainer(**common, callbacks=[clock])
    phases = {"warmup": 0.0, "search": 0.5}
    target = TargetConfig(kept=options.kept, align=options.align)
    prune = PruneConfig(target=target, mask="saliency", compensation="none", phases=phases)
    return PruneTuneTrainer(**common, prune=prune, callbacks=[clock, StopAfter(count)])


class StopAfter(TrainerCallback):
    """Ends the training after so many steps."""

    def __init__(self, steps: int):
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self._steps


if __name__ == "__main__":
    main()
