"""What dropping a part of what was learnt costs: perplexity by method and rate, with and without the regulariser.

    python scripts/bench/delta_quality.py --model smollm2-135m --data medquad/ gsm8k/ --work tuned/ --out result.json

Each data folder holds train.jsonl and validation.jsonl. The model is tuned once for every folder and regulariser (the
adapters stay in ``--work``), then pruned by every method at every rate, random ones under several mask seeds. What a
method leaves open (q) is searched with the first seed's masks, on rows that the perplexity is not measured on. ``grid``
holds the closed form's q against a brute-force grid of one q for all tensors and of multipliers of the closed form, on
the measured rows themselves. Results are appended as they come, so a stopped bench goes on where it was; ``--summary``
prints medians.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
from peft import PeftModel

from prunetune.config.schema import DeltaConfig, RunConfig
from prunetune.core.files import new_folder, read_json, write_json
from prunetune.data.load import load_bundle
from prunetune.export.changed import live_deltas
from prunetune.methods.deltas import DELTAS, check_delta
from prunetune.model.delta_inputs import Inputs, measure_inputs
from prunetune.model.resolve import resolve_model
from prunetune.model.token_rows import TokenRow, token_rows
from prunetune.pipeline.delta_stage import SEARCH_ROWS, DeltaStage
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.train.settings import lora_config, sft_config

METHODS: dict[str, dict[str, Any]] = {
    "dare": {},
    "darex_q:closed_form": {"q": "closed_form"},
    "darex_q:auto": {"q": "auto"},
    "darex_q:search": {"q": "search"},
    "darex_q:analytic": {"q": "analytic"},
    "magnitude": {},
    "magnitude:model": {"scope": "model"},
    "wanda": {},
    "della": {},
    "structural": {},
    "rank": {},
}
GRID_POINTS, MULTIPLIERS = 17, (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def main() -> None:
    options = parse()
    done: list[dict[str, Any]] = read_json(options.out) if options.out.exists() else []
    for folder in options.data:
        for regularize in options.regularize:
            subject = Subject(folder, regularize, options)
            for key, row in subject.rows(done):
                done.append({**key, **row})
                print(json.dumps(done[-1]), flush=True)
                write_json(options.out, done)
    if options.summary:
        print_summary(done)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the tuned adapters")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--regularize", nargs="+", default=["none", "l2", "l1"])
    parser.add_argument("--strength", type=float, default=DeltaConfig().strength)
    parser.add_argument("--drops", nargs="+", type=float, default=[0.5, 0.9, 0.95, 0.99, 0.999])
    parser.add_argument("--grid-drops", nargs="*", type=float, default=[0.9, 0.99])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the masks")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=64, help="rows that perplexity is measured on")
    parser.add_argument("--search-rows", type=int, default=SEARCH_ROWS, help="rows that open options are searched on")
    parser.add_argument("--summary", action="store_true")
    return parser.parse_args()


class Subject:
    """One tuned model and the rows that it is measured on.

    Args:
        data: folder of the rows. regularize: of the training. options: of the command line.
    """

    def __init__(self, data: Path, regularize: str, options: argparse.Namespace):
        self._options, self._regularize = options, regularize
        self.key = {
            "model": options.model,
            "data": data.name,
            "regularize": regularize,
            "strength": options.strength if regularize != "none" else None,
            "steps": options.steps,
            "learning_rate": options.learning_rate,
            "rows": options.rows,
            "search_rows": options.search_rows,
        }
        prepared = resolve_model(options.model)
        self._tokenizer = load_tokenizer(prepared)
        config = self._settings(data)
        bundle = load_bundle(config.data, tokenizer=self._tokenizer, max_length=options.length)
        rows = self._encoded(bundle.validation)
        self._search_rows, self._measured = rows[: options.search_rows], rows[options.search_rows :]
        strength = "" if regularize == "none" else f"-{options.strength:g}"
        folder = options.work / f"{data.name}-{regularize}{strength}-{options.steps}"
        if not folder.exists():
            self._train(config, prepared, bundle, folder)
        base = load_base(prepared, "float32").to("cuda" if torch.cuda.is_available() else "cpu")
        self._model = PeftModel.from_pretrained(base, folder).eval()
        self._seen: dict[str, Inputs] = {}
        self._settled: dict[tuple[str, float], dict[str, Any]] = {}

    def _settings(self, data: Path) -> RunConfig:
        options = self._options
        delta: dict[str, Any] = {"regularize": self._regularize}
        if self._regularize != "none":
            delta["strength"] = options.strength
        return RunConfig(
            model={"name": options.model},
            data={
                "train": str(data / "train.jsonl"),
                "validation": str(data / "validation.jsonl"),
                "validation_rows": options.search_rows + options.rows,
                "max_rows": options.steps * options.batch,
            },
            target={"kept": "100%"},
            compensation={"method": "none"},
            delta=delta,
            lora={"rank": options.rank, "alpha": 2 * options.rank},
            train={
                "max_steps": options.steps,
                "batch_size": options.batch,
                "max_length": options.length,
                "learning_rate": options.learning_rate,
            },
        )

    def _encoded(self, rows: Any) -> list[TokenRow]:
        return token_rows(self._tokenizer, rows, self._options.length)

    def _train(self, config: RunConfig, prepared: Any, bundle: Any, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = PruneTuneTrainer(
                model=load_base(prepared, "float32"),
                args=sft_config(config, Path(scratch), self._options.steps),
                train_dataset=bundle.train,
                processing_class=self._tokenizer,
                peft_config=lora_config(config),
                prune=config.prune(),
            )
            trainer.train()
            with new_folder(folder) as place:
                trainer.model.save_pretrained(place)

    def rows(self, done: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(what is measured, the figures) of everything that is not done yet."""
        for drop in (0.0, 1.0):
            key = self.key | {"method": "whole" if drop == 0 else "base", "drop": drop, "seed": 0}
            if not _known(key, done):
                stage = self._stage("dare", 0)
                yield key, {"perplexity": stage.perplexity(stage.build({"drop": drop}), self._measured)}
        for name in self._options.methods:
            method = name.partition(":")[0]
            seeds = self._options.seeds if DELTAS.get(method).random else [0]
            for drop in self._options.drops:
                for seed in seeds:
                    key = self.key | {"method": name, "drop": drop, "seed": seed}
                    if not _known(key, done) and not check_delta(method, {**METHODS[name], "drop": drop}):
                        yield key, self._measure(name, drop, seed)
        for drop in self._options.grid_drops:
            key = self.key | {"method": "grid", "drop": drop, "seed": 0}
            if not _known(key, done):
                yield key, self._grid(drop)

    def _stage(self, name: str, seed: int) -> DeltaStage:
        config = DeltaConfig(method=name.partition(":")[0], **METHODS[name])
        return DeltaStage(self._model, self._tokenizer, None, config, seed, self._search_rows, self._inputs())

    def _inputs(self) -> dict[str, Inputs]:
        """What the linears see, measured once for all methods."""
        if not self._seen:
            device = next(self._model.parameters()).device
            ids = [torch.tensor([row.input_ids], device=device) for row in self._search_rows]
            batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
            self._seen = measure_inputs(self._model.get_base_model(), live_deltas(self._model), batches)
        return self._seen

    def _measure(self, name: str, drop: float, seed: int) -> dict[str, Any]:
        if (name, drop) not in self._settled:
            self._settled[name, drop] = self._stage(name, self._options.seeds[0]).settle(drop).options
        options, stage = self._settled[name, drop], self._stage(name, seed)
        method = stage.build(options)
        found: dict[str, Any] = {"perplexity": stage.perplexity(method, self._measured)}
        if asked := stage.build(METHODS[name] | {"drop": drop}).search:
            found |= {"searched": asked.option, "value": options[asked.option]}
        if divisors := stage.divisors(method):
            found["median_q"] = median(divisors.values())
        return found

    def _grid(self, drop: float) -> dict[str, Any]:
        """Every q of a grid and every multiplier of the closed form, on the very rows that are measured."""
        stage, keep = self._stage("darex_q:closed_form", 0), 1 - drop

        def perplexity(**options: Any) -> float:
            return stage.perplexity(stage.build({"drop": drop, **options}), self._measured)

        places = [keep ** (1 - i / (GRID_POINTS - 1)) for i in range(GRID_POINTS)]
        one_q = {f"{q:.4g}": perplexity(q=q) for q in places}
        closed = {f"{tau:g}": perplexity(q="closed_form", multiplier=tau) for tau in MULTIPLIERS}
        return {
            "one_q": one_q,
            "best_one_q": min(one_q, key=one_q.__getitem__),
            "multipliers": closed,
            "best_multiplier": min(closed, key=closed.__getitem__),
            "closed_form_over_best_one_q": closed["1"] / min(one_q.values()),
            "closed_form_over_best_multiplier": closed["1"] / min(closed.values()),
        }


def _known(key: dict[str, Any], done: list[dict[str, Any]]) -> bool:
    return any(all(row.get(name) == value for name, value in key.items()) for row in done)


def print_summary(done: list[dict[str, Any]]) -> None:
    """Median perplexity over mask seeds, a line a method."""
    subjects = list(dict.fromkeys((row["data"], row["regularize"]) for row in done))
    for data, regularize in subjects:
        rows = [row for row in done if (row["data"], row["regularize"]) == (data, regularize) and "perplexity" in row]
        print(f"\n{data}, regularize {regularize}")
        for name in dict.fromkeys(row["method"] for row in rows):
            drops = sorted({row["drop"] for row in rows if row["method"] == name})
            cells = [
                f"{drop:.1%}: {median(r['perplexity'] for r in rows if (r['method'], r['drop']) == (name, drop)):.3f}"
                for drop in drops
            ]
            print(f"  {name:22} " + "  ".join(cells))


if __name__ == "__main__":
    main()
