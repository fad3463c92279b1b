"""What the smaller model saves: prefill and decode of an export against its base, taking turns in one process.

    python scripts/bench/inference_speed.py --base smollm2-135m --compact runs/quickstart/compact --out speed.json

Prefill speed-up is held against the ratio of FLOPs; decode is reported as it is (it waits for memory).
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
from _common import report

from prunetune.core.files import read_json
from prunetune.evaluate.harness import EvalSettings
from prunetune.evaluate.speed import compare_speed
from prunetune.model.architecture import describe
from prunetune.model.budget import flops_per_token, full_shape
from prunetune.model.resolve import resolve_model


def main() -> None:
    from transformers import AutoModelForCausalLM

    options = parse()
    settings = EvalSettings(dtype=options.dtype).resolved()
    folders = {"base": resolve_model(options.base).folder, "compact": options.compact}
    models = {
        label: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype)).to(settings.device)
        for label, folder in folders.items()
    }
    speeds = compare_speed(
        models, prompt_tokens=options.prompt, new_tokens=options.new, repeats=options.repeats, batch_sizes=(1, 8)
    )
    flops = {}
    for label, folder in folders.items():
        arch = describe(read_json(folder / "config.json"))
        # Prefill needs the LM head for the last token only.
        head = 2 * arch.vocab_size * arch.hidden_size
        flops[label] = flops_per_token(arch, full_shape(arch), options.prompt // 2) - head + head // options.prompt
    flop_ratio = flops["base"] / flops["compact"]
    result = {
        "dtype": settings.dtype,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "flop_ratio": round(flop_ratio, 4),
        "speedups": {name: asdict(ratio) for name, ratio in speeds["compact"].ratios.items()},
    }
    for batch in (1, 8):
        result[f"prefill_b{batch}_speedup_over_flop_ratio"] = round(
            result["speedups"][f"prefill_tps_b{batch}"]["median"] / flop_ratio, 4
        )
    report(result, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--compact", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
