"""Joint against two-stage pruning: same data, budget, steps, tokens, schedule and seed; quality and time.

    python scripts/bench/joint_vs_two_stage.py --data medquad/ --general wikitext2/validation.txt --out result.json

``--data`` holds train.jsonl and validation.jsonl with prompt and completion. A recipe is
``kind[:mask[:compensation]]``:

    base                      the model as it is
    dense                     plain LoRA, nothing removed
    joint:saliency:refit      masks while the adapters learn, freeze, compensation, recover
    one_shot:saliency:refit   gate scores of the untrained model, cut, compensation, then LoRA for all the steps
    one_shot:random:refit     the same with units chosen by lot

Rows and tokens are chosen online with, for example, ``--set data.samples.method=q_tuning data.samples.kept=25%``.
Results are appended as they come, so a stopped bench goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
from datasets import Dataset

from prunetune.config.presets import phase_steps
from prunetune.config.schema import RunConfig
from prunetune.core.files import write_json
from prunetune.data.load import load_bundle
from prunetune.evaluate.perplexity import domain_perplexity, text_perplexity
from prunetune.model.architecture import describe
from prunetune.model.budget import kept_fractions, plan_shape
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.train.calibration import calibration_batches
from prunetune.train.joint import JointSearch, reducer
from prunetune.train.settings import lora_config, sft_config

RECIPES = ("base", "dense", "joint:saliency:refit", "one_shot:saliency:refit", "one_shot:random:refit")


def main() -> None:
    options = parse()
    done: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    for kept in options.kept:
        for recipe in options.recipes:
            for seed in options.seeds:
                # The two references do not depend on the budget.
                budget = None if recipe in ("base", "dense") else kept
                key = {"recipe": recipe, "kept": budget, "seed": seed, "set": options.set, "steps": options.steps}
                if any(all(row.get(name) == value for name, value in key.items()) for row in done):
                    continue
                row = {**key, **measure(recipe, kept, seed, options)}
                print(json.dumps(row), flush=True)
                done.append(row)
                write_json(options.out, done)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--general", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kept", nargs="+", default=["80%", "60%"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=100, help="validation rows")
    parser.add_argument("--set", nargs="*", default=[], help="further settings, e.g. phases.search=0.3")
    return parser.parse_args()


def settings(kept: str, mask: str, compensation: str, seed: int, options: argparse.Namespace) -> RunConfig:
    """The run's settings: defaults, the bench's sizes, then ``--set``."""
    from omegaconf import OmegaConf

    values = {
        "model": {"name": options.model},
        "data": {
            "train": str(options.data / "train.jsonl"),
            "validation": str(options.data / "validation.jsonl"),
            "general_text": str(options.general) if options.general else None,
            "validation_rows": options.rows,
        },
        "target": {"kept": kept},
        "mask": {"method": mask},
        "compensation": {"method": compensation},
        "train": {"max_steps": options.steps, "batch_size": options.batch, "max_length": options.length},
        "seed": seed,
    }
    merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(options.set))
    return RunConfig(**OmegaConf.to_container(merged))


def measure(recipe: str, kept: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one recipe and measures it."""
    kind, mask, compensation = (
        [*recipe.split(":"), "saliency", "refit"][:3] if ":" in recipe else (recipe, "saliency", "none")
    )
    config = settings(kept, mask, compensation, seed, options)
    prepared = resolve_model(config.model.name)
    tokenizer = load_tokenizer(prepared)
    data = load_bundle(config.data, tokenizer=tokenizer, max_length=options.length, seed=seed)
    if kind == "base":
        return quality(load_base(prepared, "float32"), tokenizer, data, options)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PruneTuneTrainer(
            model=load_base(prepared, config.model.dtype),
            args=sft_config(config, Path(scratch), options.steps),
            train_dataset=data.train,
            eval_dataset=Dataset.from_list(list(data.validation)[:40]),
            processing_class=tokenizer,
            peft_config=lora_config(config),
            prune=None if kind == "dense" else config.prune(),
            select=config.selection(),
            evaluate_at_freeze=True,
        )
        start = time.perf_counter()
        if kind == "one_shot":
            trainer.cut_from_scores(one_shot_scores(trainer, config))
        trainer.train()
        seconds = time.perf_counter() - start
        found = {"seconds": round(seconds, 1), **cut_losses(Path(scratch))}
        if trainer.plan is not None:
            shape = plan_shape(trainer.dense, trainer.plan)
            found |= {"shape": str(shape), "kept_decoder": kept_fractions(trainer.dense, shape)["decoder"]}
        return {**found, **quality(trainer.model, tokenizer, data, options)}


def one_shot_scores(trainer: PruneTuneTrainer, config: RunConfig) -> dict[str, torch.Tensor]:
    """Scores of the mask method on the untrained model, from as many tokens as the compensation uses."""
    assert trainer.prune is not None
    search = JointSearch(trainer.model, trainer.prune, trainer.planner, phase_steps(config.phases, 1000))
    trainer.model.train()
    for step, batch in enumerate(calibration_batches(trainer, 16384, config.seed)):
        search.begin_step(step)
        items = (batch["labels"][:, 1:] != -100).sum()
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).backward()
        search.end_step(step, reducer(trainer.accelerator, True))
        trainer.model.zero_grad()
    search.gate_set.detach()
    return search.mask.scores()


def cut_losses(folder: Path) -> dict[str, float]:
    """Validation losses right before and after the cut, from the metrics file."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found |= {name: entry[name] for name in ("eval_before_cut_loss", "eval_after_cut_loss") if name in entry}
    return found


def quality(model: Any, tokenizer: Any, data: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexities of the held-out rows and of general text, in float32."""
    numbers = {
        "domain_ppl": domain_perplexity(model, tokenizer, data.validation, options.length, options.batch).perplexity
    }
    if options.general:
        numbers["general_ppl"] = text_perplexity(model, tokenizer, data.general_text, 8192, 512).perplexity
    arch = describe(model.config)
    return {**{name: round(value, 3) for name, value in numbers.items()}, "model": arch.model_type}


if __name__ == "__main__":
    main()
