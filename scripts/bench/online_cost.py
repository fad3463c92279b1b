"""What choosing rows in every step costs and saves: whole optimizer steps against plain TRL LoRA steps.

    python scripts/bench/online_cost.py --model smollm2-135m --out online_cost.json

With LoRA a forward pass counts 1 and the backward pass 1 (the base's weights are frozen), so scoring everything and
training on a share r costs (1 + 2r) / 2 of a plain step: half of the rows break even, an eighth costs 0.625. With
activation checkpointing it is (1 + 3r) / 3. All kinds of step take turns on the same rows in one process; ratios are
medians over turns with quartiles. Token pruning keeps every row: what it saves is the output layer's work, if any.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
from _common import report, settle, spread
from datasets import Dataset

from prunetune.config.schema import RunConfig, SelectionConfig
from prunetune.core.streams import stream
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.train.settings import lora_config, sft_config

KEPT = (0.125, 0.25, 0.5)


def main() -> None:
    options = parse()
    kinds: dict[str, SelectionConfig | None] = {"plain": None}
    for kept in KEPT:
        kinds[f"rows {kept:.1%}"] = SelectionConfig(samples={"method": "q_tuning", "kept": kept})
    kinds["tokens 50%"] = SelectionConfig(tokens={"method": "neighbour_perplexity", "kept": 0.5})
    steppers = {name: stepper(select, options) for name, select in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(options.repeats + 1):
        for name, step in steppers.items():
            seconds = step()
            if turn:  # the first turn warms up
                times[name].append(seconds)
    forwards = 3 if options.checkpointing else 2
    result = {
        "model": options.model,
        "batch": options.batch,
        "length": options.length,
        "checkpointing": options.checkpointing,
        "over_plain": {
            name: spread([mine / plain for mine, plain in zip(values, times["plain"], strict=True)])
            for name, values in times.items()
            if name != "plain"
        },
        "expected": {f"rows {kept:.1%}": round((1 + forwards * kept) / forwards, 4) for kept in KEPT},
    }
    report(result, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def stepper(select: SelectionConfig | None, options: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one whole optimizer step, choosing included, and returns its seconds."""
    config = RunConfig(
        model={"name": options.model},
        target="60%",  # a run needs one; nothing is pruned here
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
    trainer: Any = PruneTuneTrainer(
        model=load_base(prepared, config.model.dtype),
        args=sft_config(config, Path(tempfile.mkdtemp()), 1000),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(config),
        select=select,
    )
    trainer.model = trainer.accelerator.prepare_model(trainer.model)  # bfloat16 arithmetic, as in train()
    trainer.create_optimizer()
    trainer.model.train()
    trainer.state.max_steps = 1000
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(options.batch)])

    def step() -> float:
        start = time.perf_counter()
        batches, count = trainer.get_batch_samples(iter([dict(batch)]), 1, torch.device(trainer.args.device))
        for micro_batch in batches:
            trainer.training_step(trainer.model, micro_batch, num_items_in_batch=count)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1
        settle()
        return time.perf_counter() - start

    return step


if __name__ == "__main__":
    main()
