"""Joint against two-stage pruning: same data, budget, steps, tokens, schedule and seed; quality, time and memory.

    python scripts/bench/joint_vs_two_stage.py --data medquad/ --general wikitext2/validation.txt --out results/

A `prunetune compare` of the recipes that the claim is about: the base, plain LoRA, every mask of ``--masks`` trained
jointly, and the base cut in one shot before LoRA trains for all the steps, by gate gradients (``fisher``) and by lot.
``--data`` holds train.jsonl and validation.jsonl with prompt and completion. Rows and tokens are chosen online with,
for example, ``--set data.samples.method=q_tuning data.samples.kept=25%``. The results are printed as JSON; a stopped
bench goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

from prunetune.core.files import write_json
from prunetune.pipeline.compare_run import compare_recipes


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    # JSON is YAML.
    write_json(file := options.out / "comparison.yaml", settings(options))
    print(json.dumps(compare_recipes(file, options.set), indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--general", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, table, figure and page")
    parser.add_argument("--kept", nargs="+", default=["80%", "60%"])
    parser.add_argument("--masks", nargs="+", default=["saliency", "hard_concrete", "random"])
    parser.add_argument("--compensation", nargs="+", default=["refit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=100, help="validation rows")
    parser.add_argument("--set", nargs="*", default=[], help="further settings, e.g. phases.search=0.3")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> dict[str, object]:
    """A comparison: defaults, the bench's sizes and recipes."""
    return {
        "model": options.model,
        "data": {
            "train": str(options.data / "train.jsonl"),
            "validation": str(options.data / "validation.jsonl"),
            "general_text": str(options.general) if options.general else None,
            "validation_rows": options.rows,
        },
        "train": {"max_steps": options.steps, "batch_size": options.batch, "max_length": options.length},
        "evaluate": {"rows": options.rows, "speed": False},
        "folder": str(options.out),
        "compare": {
            "kept": options.kept,
            "seeds": options.seeds,
            "recipes": [
                "base",
                "dense",
                {"joint": options.masks, "compensation": options.compensation},
                {"one_shot": ["fisher", "random"], "compensation": options.compensation},
            ],
        },
    }


if __name__ == "__main__":
    main()
