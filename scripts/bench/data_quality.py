"""Do selections find bad rows, and does training on them help? Planted faults, then equal steps and equal tokens.

    python scripts/bench/data_quality.py recall --data medquad/ --out recall.json
    python scripts/bench/data_quality.py train  --data medquad/ --out train.json --recipes all random online:q_tuning

``--data`` holds train.jsonl and validation.jsonl with prompt and completion. Of the training rows 20% get another row's
answer, 10% are near copies of other rows and 10% are cut off in the middle of the answer. ``recall`` scores them once
and says which share of each fault every method drops; a method that draws by lot drops ``1 - kept`` of each.
``train`` fine-tunes with plain LoRA on what a recipe keeps, and measures clean held-out rows. A recipe is ``all``,
``clean`` (all without the faults: what perfect selection would give), a sample method, or ``online:METHOD`` (chosen
anew in every step). Steps are equal; with ``--equal tokens`` the forward tokens are. Results are appended as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import numpy as np

from prunetune.config.schema import RunConfig, SelectionConfig
from prunetune.core.files import write_json
from prunetune.core.streams import stream
from prunetune.data.scorer import DEFAULT_EXTRAS, ScoringOptions
from prunetune.data.scoring import row_id, score
from prunetune.data.selection import select
from prunetune.data.sources import read, training_rows
from prunetune.data.store import StoredScores
from prunetune.evaluate.exact_match import exact_match
from prunetune.evaluate.perplexity import domain_perplexity
from prunetune.methods.samples import SAMPLES
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.train.settings import lora_config, sft_config

# Rows that LESS aims at; they are not among those that quality is measured on.
AIMS = 16
FAULTS = {"shuffled": 0.2, "near_copy": 0.1, "truncated": 0.1}


@dataclass(frozen=True)
class Planted:
    """Rows as conversations (or strings), and what is wrong with each, by id; "" is a good row."""

    rows: list[dict[str, Any]]
    fault: dict[str, str]
    aims: list[dict[str, Any]]
    validation: list[dict[str, Any]]


def main() -> None:
    options = parse()
    prepared = resolve_model(options.model)
    tokenizer = load_tokenizer(prepared)
    data = plant(options, bool(tokenizer.chat_template))
    recipes = options.recipes or (sorted(SAMPLES.names()) if options.what == "recall" else ["all", "clean", "random"])
    scores = scored(options, recipes, data, prepared, tokenizer)
    done: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    for recipe in recipes:
        for seed in options.seeds:
            key = {"what": options.what, "recipe": recipe, "kept": options.kept, "seed": seed}
            key |= {"equal": options.equal, "steps": options.steps} if options.what == "train" else {}
            if any(all(row.get(name) == value for name, value in key.items()) for row in done):
                continue
            measure = recall if options.what == "recall" else train
            row = {**key, **measure(recipe, seed, options, data, scores, prepared, tokenizer)}
            print(json.dumps(row), flush=True)
            done.append(row)
            write_json(options.out, done)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("recall", "train"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scores", type=Path, help="folder of scores; default: beside --out")
    parser.add_argument("--kept", type=float, default=0.6)
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, default=600, help="training rows, faults included")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="of the scoring model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--equal", choices=("steps", "tokens"), default="steps")
    parser.add_argument("--validation-rows", type=int, default=80)
    parser.add_argument("--answer", help="regular expression of final answers: exact matches are measured too")
    return parser.parse_args()


def plant(options: argparse.Namespace, chat: bool) -> Planted:
    """Faults in fixed shares of the first rows, drawn by lot."""
    rows = training_rows(read(str(options.data / "train.jsonl"), "--data")).values
    held = training_rows(read(str(options.data / "validation.jsonl"), "--data")).values
    lot = stream(0, "planted faults")
    index = lot.permutation(len(rows))[: options.rows]
    pairs = [(rows[i]["prompt"], rows[i]["completion"]) for i in index]
    fault = np.array([""] * len(pairs), dtype=object)
    start = 0
    for name, share in FAULTS.items():
        count = round(share * len(pairs))
        fault[start : start + count] = name
        start += count
    shuffled = np.flatnonzero(fault == "shuffled")
    answers = [pairs[i][1] for i in np.roll(shuffled, 1)]
    for place, answer in zip(shuffled, answers):
        pairs[place] = (pairs[place][0], answer)
    good = np.flatnonzero(fault == "")
    for place, source in zip(np.flatnonzero(fault == "near_copy"), lot.permutation(good)):
        pairs[place] = (pairs[source][0], near_copy(pairs[source][1], lot))
    for place in np.flatnonzero(fault == "truncated"):
        words = pairs[place][1].split(" ")
        pairs[place] = (pairs[place][0], " ".join(words[: max(3, len(words) // 3)]))
    made = [as_row(*pair, chat) for pair in pairs]
    return Planted(
        made,
        {row_id(row): str(name) for row, name in zip(made, fault)},
        [as_row(row["prompt"], row["completion"], chat) for row in held[:AIMS]],
        [as_row(row["prompt"], row["completion"], chat) for row in held[AIMS : AIMS + options.validation_rows]],
    )


def near_copy(text: str, lot: np.random.Generator) -> str:
    """The text with one word in fifty left out."""
    words = text.split(" ")
    gone = set(lot.permutation(len(words))[: max(1, len(words) // 50)].tolist())
    return " ".join(word for i, word in enumerate(words) if i not in gone)


def as_row(prompt: str, completion: str, chat: bool) -> dict[str, Any]:
    if not chat:
        return {"prompt": prompt + "\n", "completion": completion}
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def scored(
    options: argparse.Namespace, recipes: list[str], data: Planted, prepared: Any, tokenizer: Any
) -> StoredScores:
    """One pass with everything that the recipes' methods read; made once."""
    needs = {need for recipe in recipes if recipe in SAMPLES.names() for need in SAMPLES.get(recipe).needs}
    dear = [name for name, column in {"ifd": "direct_nll", "influence": "influence"}.items() if column in needs]
    folder = options.scores or options.out.with_suffix(".scores")
    found = score(
        data.rows,
        load_base(prepared, options.dtype),
        tokenizer,
        folder=folder,
        max_length=options.length,
        options=ScoringOptions(extras=(*DEFAULT_EXTRAS, *dear)),
        validation=data.aims,
    )
    assert found is not None
    return found


def recall(
    recipe: str, seed: int, options: argparse.Namespace, data: Planted, scores: StoredScores, *_: Any
) -> dict[str, Any]:
    """Share of each fault that the method drops, and of the good rows that it drops with them."""
    if recipe == "infobatch":
        return {"left_out": "it needs losses of a training run"}
    choice = select(scores, samples_method=recipe, samples_kept=options.kept, seed=seed).choice
    fault = np.array([data.fault[name] for name in scores.table.ids], dtype=object)
    dropped = {name or "good": float((~choice.keep)[fault == name].mean()) for name in ("", *FAULTS)}
    lengths = scores.table.targets
    return {
        "dropped": {name: round(value, 3) for name, value in dropped.items()},
        "kept_rows": int(choice.keep.sum()),
        "kept_target_tokens": round(float(lengths[choice.keep].sum() / lengths.sum()), 3),
    }


def train(
    recipe: str,
    seed: int,
    options: argparse.Namespace,
    data: Planted,
    scores: StoredScores,
    prepared: Any,
    tokenizer: Any,
) -> dict[str, Any]:
    """Plain LoRA on what the recipe keeps; perplexity of clean held-out rows."""
    online = recipe.removeprefix("online:") if recipe.startswith("online:") else None
    settings: dict[str, Any] = {} if recipe in ("all", "clean") or online else {"samples_method": recipe}
    rows = select(scores, **settings, samples_kept=options.kept if settings else 1.0, seed=seed).dataset()
    if recipe == "clean":
        rows = rows.filter(lambda row: data.fault[row["id"]] == "")
    steps = options.steps
    if options.equal == "tokens":
        everything = float(np.mean(scores.table.rows["length"]))
        steps = max(1, round(steps * everything / float(np.mean([len(ids) for ids in rows["input_ids"]]))))
        # An online choice trains on kept * batch rows a step: as many tokens take as many times the steps.
        steps = round(steps / options.kept) if online else steps
    config = RunConfig(
        model={"name": options.model},
        target="60%",  # a run needs one; nothing is pruned here
        train={
            "max_steps": steps,
            "batch_size": options.batch,
            "max_length": options.length,
            "learning_rate": options.rate,
            "scheduler": "cosine",
        },
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PruneTuneTrainer(
            model=load_base(prepared, config.model.dtype),
            args=sft_config(config, Path(scratch), steps),
            train_dataset=rows.remove_columns("id"),
            processing_class=tokenizer,
            peft_config=lora_config(config),
            select=SelectionConfig(samples={"method": online, "kept": options.kept}, seed=seed) if online else None,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        found = domain_perplexity(trainer.model, tokenizer, data.validation, options.length, options.batch)
        tokens = trainer._total_train_tokens
        exact = {}
        if options.answer:
            right = exact_match(trainer.model, tokenizer, data.validation, options.answer, 256, options.batch)
            exact = {"exact_match": round(right, 4)}
    return exact | {
        "rows": len(rows),
        "optimizer_steps": steps,
        "tokens_seen": int(tokens),
        "seconds": round(seconds, 1),
        "domain_ppl": round(found.perplexity, 3),
        "top1": round(found.top1, 4),
    }


if __name__ == "__main__":
    main()
