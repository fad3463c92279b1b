"""What scoring costs: one scoring pass against bare forward passes of the same batches, time and peak memory.

    python scripts/bench/scoring_speed.py --model smollm2-135m --data medquad/train.jsonl --out scoring_speed.json

Time: the sides take turns on the same rows in one process; ``throughput`` is the forward pass's seconds over the
scoring pass's, so 1 means that scoring is free. Memory: each side runs alone in a fresh process on one row of 2048
tokens; ``hidden`` is the forward pass without the output layer, the least that any scoring needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
from _common import report, settle, spread

from prunetune.core.streams import stream
from prunetune.data.scorer import Scorer, ScoringOptions, equal_lengths
from prunetune.data.scoring import RowsToScore, rows_to_score
from prunetune.data.sources import read, training_rows
from prunetune.evaluate.memory import peak_resident_bytes
from prunetune.model.resolve import resolve_model
from prunetune.model.token_rows import TokenRow
from prunetune.model.token_stats import hidden_states
from prunetune.pipeline.loading import load_base, load_tokenizer

SIDES = ("hidden", "forward", "scoring")
OPTIONS = {
    "tokens": ScoringOptions(extras=()),
    "default": ScoringOptions(),
    "with_ifd": ScoringOptions(extras=("last_layer", "embedding", "ifd")),
}


def main() -> None:
    options = parse()
    prepared = resolve_model(options.model)
    model, tokenizer = load_base(prepared, options.dtype).eval(), load_tokenizer(prepared)
    if torch.cuda.is_available():
        model = model.cuda()
    if options.only:
        print(json.dumps({"peak_bytes": measure_alone(options.only, model, tokenizer)}))
        return
    values = training_rows(read(str(options.data), "--data")).values[: options.rows]
    if tokenizer.chat_template:
        values = [as_chat(row) for row in values]
    rows = rows_to_score(values, tokenizer, max_length=options.length)
    memory = {side: measure_memory(side, options) for side in SIDES}
    result = {
        "model": options.model,
        "dtype": options.dtype,
        "rows": len(rows.ids),
        "tokens": sum(len(row.input_ids) for row in rows.rows),
        "targets": sum(row.targets for row in rows.rows),
        "throughput": measure_times(model, tokenizer, rows, options.repeats),
        "peak_bytes": memory,
        "memory_over_forward": round(memory["scoring"] / memory["forward"], 4),
        "memory_over_hidden": round(memory["scoring"] / memory["hidden"], 4),
    }
    report(result, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=SIDES, help="run one side alone and print its peak memory")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt-completion row as the conversation that training makes of it."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


@torch.no_grad()
def forward_pass(model: Any, rows: RowsToScore) -> None:
    """The same batches, hidden states and logits, nothing else."""
    for batch in equal_lengths([len(row.input_ids) for row in rows.rows], ScoringOptions().batch_tokens):
        model(input_ids=torch.tensor([rows.rows[i].input_ids for i in batch], device=model.device), use_cache=False)
    settle()


def measure_times(model: Any, tokenizer: Any, rows: RowsToScore, repeats: int) -> dict[str, dict[str, float]]:
    """Scoring with each set of statistics -> median and quartiles of forward seconds over scoring seconds."""
    scorers = {name: Scorer(model, tokenizer, option) for name, option in OPTIONS.items()}
    ratios: dict[str, list[float]] = {name: [] for name in scorers}
    for turn in range(repeats + 1):
        start = time.perf_counter()
        forward_pass(model, rows)
        bare = time.perf_counter() - start
        for name, scorer in scorers.items():
            start = time.perf_counter()
            scorer.table(rows.ids, rows.rows, rows.columns, rows.opening)
            settle()
            if turn:  # the first turn warms up
                ratios[name].append(bare / (time.perf_counter() - start))
    return {name: spread(values) for name, values in ratios.items()}


def measure_memory(side: str, options: argparse.Namespace) -> int:
    """Peak bytes of a fresh process that runs one side on one long row."""
    command = [sys.executable, __file__, "--only", side, "--model", options.model, "--data", str(options.data)]
    command += ["--dtype", options.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def measure_alone(side: str, model: Any, tokenizer: Any, length: int = 2048) -> int:
    ids = stream(0, "bench").integers(100, len(tokenizer) - 100, length).tolist()
    row = TokenRow(ids, ids)
    with torch.no_grad():
        if side == "hidden":
            hidden_states(model, torch.tensor([ids], device=model.device))
        elif side == "forward":
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        else:
            Scorer(model, tokenizer, ScoringOptions()).table(["0"], [row], {})
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


if __name__ == "__main__":
    main()
