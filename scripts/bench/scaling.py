"""What joint training adds under every engine: step time and memory against plain TRL LoRA under the same engine.

    python scripts/bench/scaling.py --out scaling.json

For every engine and number of processes a joint run (search phase) and a plain one take their steps in turns, in the
same processes; ratios are of neighbouring steps and given with their spread. Peak memory is that of fresh processes of
either kind. Beside it, from the tensors themselves, the largest process's bytes of optimizer, gates and mask. On a
CPU, and wherever processes share a device, times of more processes say nothing about speed: only the ratios do. FSDP2
runs on CPUs as in the tests (tests/distributed/fsdp_on_cpu.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Semaphore
from typing import Any

import psutil

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
import yaml
from _common import report, settle, spread
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from prunetune import PruneConfig, PruneTuneTrainer
from prunetune.config.engines import ENGINES, launch_settings
from prunetune.config.schema import TargetConfig
from prunetune.core.streams import stream
from prunetune.evaluate.memory import peak_resident_bytes
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_for_training, load_tokenizer
from prunetune.train.engine import Engine
from prunetune.train.launched import engine_name
from prunetune.train.portable import PortableTrainer
from tests.distributed.fsdp_on_cpu import force_fsdp
from tests.support import tiny_folder

KINDS = ("plain", "joint")
# A random model whose step takes long enough for its parts to show: 25 million parameters in the decoder's linears.
MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
RUNS = ("single", "ddp:2", "zero2:1", "zero2:2", "zero3:1", "zero3:2", "fsdp2:1", "fsdp2:2")
BYTES = ("optimizer_bytes", "gate_bytes", "mask_bytes")
# The first steps make buffers and, under ZeRO-3, a trace of what is needed when.
SETTLING_STEPS = 3


def main() -> None:
    options = parse()
    if options.only:
        measure_here(options)
        return
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        options.folder = options.model or str(tiny_folder(Path(folder) / "model", attention="sdpa", **MIDDLE))
        for run in options.runs:
            engine, _, processes = run.partition(":")
            results.append(compare(engine, int(processes or 1), options))
            print(json.dumps(results[-1]), flush=True)
    found = {
        "model": options.model or MIDDLE,
        "batch": options.batch,
        "length": options.length,
        "steps": options.steps,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "seconds": round(time.monotonic() - began),
        "results": results,
    }
    report(found, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a random one of 29 million parameters")
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="ENGINE[:PROCESSES]")
    parser.add_argument("--batch", type=int, default=2, help="rows of each process")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--kept", default="60%")
    parser.add_argument("--align", type=int, default=64, help="MLP widths are multiples of it; 8 for tiny models")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of either kind")
    parser.add_argument("--dtype", default="float32", help="of the base")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these, in this process")
    parser.add_argument("--fsdp", action="store_true", help="with --only on CPUs: under FSDP2")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: a spread takes at least two")
    for run in options.runs:
        if run.partition(":")[0] not in ENGINES:
            parser.error(f"no engine {run.partition(':')[0]!r}; there are {', '.join(ENGINES)}")
    return options


def compare(engine: str, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of both kinds in turns under one engine, and the memory of each kind alone."""
    seconds = {kind: found["step_seconds"] for kind, found in launch(KINDS, engine, processes, options).items()}
    alone = {kind: launch((kind,), engine, processes, options)[kind] for kind in KINDS}

    def memory(what: str) -> float:
        return round(alone["joint"][what] / alone["plain"][what], 4)

    return {
        "engine": engine,
        "processes": processes,
        "step_over_plain": spread([a / b for a, b in zip(seconds["joint"], seconds["plain"], strict=True)]),
        "memory_over_plain": memory("peak_bytes"),
        "memory_above_idle_over_plain": memory("above_idle_bytes"),
        "plain_step_seconds": round(median(seconds["plain"]), 4),
        "plain_peak_bytes": alone["plain"]["peak_bytes"],
        **{name: alone["joint"][name] for name in BYTES},
        "plain_optimizer_bytes": alone["plain"]["optimizer_bytes"],
    }


def launch(kinds: Sequence[str], engine: str, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run of each of these kinds in the same fresh processes; the slowest one's steps, the most memory."""
    own = [str(Path(__file__)), "--only", *kinds, "--model", options.folder, "--dtype", options.dtype]
    own += [f"--{name}={getattr(options, name)}" for name in ("batch", "length", "steps", "kept", "align")]
    # DeepSpeed compiles with the ninja that was installed with it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command, environment = [sys.executable, *own], {**os.environ, "PATH": path}
    cpu = not torch.cuda.is_available()
    if cpu:
        # As many cores for each process as there would be if each had its own.
        environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    with tempfile.TemporaryDirectory() as folder:
        if engine != "single":
            file = Path(folder) / "launch.yaml"
            forced = cpu and engine == "fsdp2"
            file.write_text(yaml.safe_dump(launch_settings("ddp" if forced else engine, processes, cpu=cpu)))
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
            command = [*launcher, "--main_process_port", "0", *own, *["--fsdp"] * forced]
            environment |= {"DS_ACCELERATOR": "cpu"} if cpu else {}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]
    if done.returncode or len(found) != processes:
        sys.exit(f"{' and '.join(kinds)} under {engine} in {processes} processes failed:\n{done.stderr[-3000:]}")
    if any((entry.pop("engine"), entry.pop("processes")) != (engine, processes) for entry in found):
        sys.exit(f"{engine} was to run in {processes} processes, and another one did")
    return {
        kind: {
            name: list(map(max, zip(*values, strict=True))) if name == "step_seconds" else max(values)
            for name in found[0][kind]
            if (values := [entry[kind][name] for entry in found])
        }
        for kind in kinds
    }


class Clock(TrainerCallback):
    """Seconds of steps, everything included; hands over to the next run after each, and waits for its turn.

    Args:
        turn: had while the run works.
        following: the next run's; of a run alone, its own.
    """

    def __init__(self, turn: Semaphore, following: Semaphore) -> None:
        self._turn, self._following = turn, following
        self._began = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settle()
        self.seconds.append(time.perf_counter() - self._began)
        self._following.release()
        self._turn.acquire()
        self._began = time.perf_counter()


class Sizes(TrainerCallback):
    """Bytes of what is kept beside the model, at the end of the last step."""

    def __init__(self, steps: int) -> None:
        self._last = steps
        self.trainer: Any = None
        self.found = dict.fromkeys(BYTES, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self._last:
            return
        engine: Engine = PortableTrainer.engine.fget(self.trainer)  # of plain TRL's trainer, too
        self.found["optimizer_bytes"] = sum(size(*state.values()) for state, _ in engine.adam_pieces())
        search = getattr(self.trainer, "_search", None)
        if search is not None:
            gates = search.gate_set
            grads = [value.grad for value in gates._values.values() if value.grad is not None]
            self.found["gate_bytes"] = size(*gates._values.values(), *grads, *gates._squares.values())
            self.found["mask_bytes"] = size(*search.mask.state_dict().values())


def size(*tensors: torch.Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_here(options: argparse.Namespace) -> None:
    """Trains in this process and prints what the steps took."""
    cuda = torch.cuda.is_available()
    if options.fsdp:
        force_fsdp()
    idle = 0 if cuda else psutil.Process().memory_info().rss
    turns = [Semaphore(int(number == 0)) for number in range(len(options.only))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(run_here, kind, options, folder, turn, following)
            for kind, turn, following in zip(options.only, turns, [*turns[1:], turns[0]], strict=True)
        ]
        results = [run.result() for run in runs]
    facts = results[0][0]
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
    memory = {"peak_bytes": peak, "above_idle_bytes": peak - idle}
    found = {kind: entry | memory for kind, (_, entry) in zip(options.only, results, strict=True)}
    # One call, so that the lines of several processes do not mix.
    sys.stdout.write(json.dumps(facts | found) + "\n")
    sys.stdout.flush()


def run_here(
    kind: str, options: argparse.Namespace, folder: str, turn: Semaphore, following: Semaphore
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(engine and processes that it got, what it took) of one run; works only while it is its turn."""
    turn.acquire()
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        count = SETTLING_STEPS + options.steps + 1
        clock, sizes = Clock(turn, following), Sizes(count)
        trainer = sizes.trainer = build(kind, options, f"{folder}/{kind}", count, [clock, sizes])
        trainer.train()
    finally:
        following.release()
    facts = {"engine": engine_name(trainer), "processes": trainer.accelerator.num_processes}
    # The first entry is from before the first step.
    return facts, {"step_seconds": clock.seconds[1 + SETTLING_STEPS :], **sizes.found}


def build(
    kind: str, options: argparse.Namespace, folder: str, count: int, callbacks: list[TrainerCallback]
) -> SFTTrainer:
    """The trainer of the kind that was asked for; the joint one stops before its freeze."""
    cpu = not torch.cuda.is_available()
    # Half of the joint run's steps are search; a callback ends it there.
    args = SFTConfig(
        output_dir=folder,
        max_steps=count if kind == "plain" else 10 * count,
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
    if kind == "plain":
        return SFTTrainer(**common, callbacks=callbacks)
    phases = {"warmup": 0.0, "search": 0.5}
    target = TargetConfig(kept=options.kept, align=options.align)
    prune = PruneConfig(target=target, mask="saliency", compensation="none", phases=phases)
    return PruneTuneTrainer(**common, prune=prune, callbacks=[*callbacks, StopAfter(count)])


class StopAfter(TrainerCallback):
    """Ends the training after so many steps."""

    def __init__(self, steps: int):
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self._steps


if __name__ == "__main__":
    main()
