"""A small run folder written by hand: 4 layers, 80 MLP channels, 4 KV groups of 2 query heads."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunetune.core.files import write_json, write_text
from prunetune.core.records import EvalResult
from prunetune.model.plan import Plan

ARCHITECTURE = {
    "family": "llama",
    "hidden_size": 32,
    "layers": 4,
    "query_heads": 8,
    "kv_groups": 4,
    "head_dim": 4,
    "mlp_channels": 80,
    "vocab_size": 320,
}


def log_entries():
    for step in range(1, 21):
        phase = "warmup" if step <= 2 else "search" if step <= 10 else "recover"
        yield {
            "step": step,
            "phase": phase,
            "loss": 4 - step / 10,
            "kept_fraction": 1.0 if step <= 2 else max(0.6, 1 - step / 20),
            "step_seconds": 2.0 if phase != "recover" else 1.25,
        }
    yield {"step": 20, "phase": "recover", "eval_loss": 2.5, "kept_fraction": 0.6}


def numbers(params, decoder, ppl, general, speedup):
    found = {
        "params_total": params,
        "params_decoder": decoder,
        "weight_bytes": 2 * params,
        "weight_bytes_bf16": 2 * params,
        "domain_ppl": ppl,
        "domain_tokens": 1234,
        "general_ppl": general,
        "peak_memory_bytes": 9e8,
    }
    for name in ("prefill", "decode"):
        for batch in (1, 8):
            found[f"{name}_tps_b{batch}"] = 100.0 * batch * speedup
            found[f"{name}_speedup_b{batch}"] = speedup
            found[f"{name}_speedup_b{batch}_low"] = speedup - 0.05
            found[f"{name}_speedup_b{batch}_high"] = speedup + 0.05
    return found


@pytest.fixture(scope="session")
def plan():
    kept = {f"layers.{layer}.mlp_channels": tuple(range(48)) for layer in range(4)}
    kept |= {f"layers.{layer}.kv_groups": (0, 2, 3) for layer in range(4)}
    return Plan(kept, ARCHITECTURE)


@pytest.fixture(scope="session")
def scores():
    generator = np.random.default_rng(0)
    found = {}
    for layer in range(4):
        # The first 48 channels carry 3/4 of the score.
        found[f"layers.{layer}.mlp_channels"] = np.repeat([3 / 48, 1 / 32], [48, 32]).astype(np.float32)
        found[f"layers.{layer}.kv_groups"] = generator.random(4, dtype=np.float32)
    return found


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return (
        EvalResult("base", root / "base", numbers(134_515_008, 106_168_320, 11.5, 39.0, 1.0)),
        EvalResult("dense LoRA", root / "dense", numbers(134_515_008, 106_168_320, 5.75, 37.0, 1.01)),
        EvalResult("compact", root / "compact", numbers(91_900_000, 63_500_000, 9.16, 153.0, 1.42)),
    )


@pytest.fixture
def run_folder(tmp_path, plan, scores, results):
    folder = tmp_path / "run"
    write_text(folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in log_entries()))
    plan.save(folder / "plan.json")
    (folder / "train" / "freeze").mkdir(parents=True)
    save_file(scores, folder / "train" / "freeze" / "scores.safetensors")
    settings = {"dtype": "bfloat16", "device": "cpu", "max_length": 512, "window": 512, "repeats": 5}
    rows = [{"label": r.label, "folder": str(r.folder), "numbers": r.numbers} for r in results]
    write_json(folder / "evaluation.json", {"settings": settings, "results": rows})
    write_text(folder / "resolved.yaml", "target:\n  kept: 0.6\nseed: 7\n")
    write_json(folder / "versions.json", {"prunetune": "0.1.0", "libraries": {"torch": "2.13.0"}})
    (folder / "compact").mkdir()
    return folder


@pytest.fixture(scope="session")
def facts():
    return {
        "base_model": "owner/small-model",
        "base_licence": "Apache-2.0",
        "data": "90 questions",
        "data_licence": "CC BY 4.0",
        "budget": "60% of decoder",
        "mask": "saliency",
        "papers": ["arXiv 1712.01312, 2310.06694", {"title": "A paper", "url": "https://example.org/p"}],
        "steps": 20,
        "seconds": 75.4,
        "verification": {"max_abs_logit_difference": 3.1e-5, "greedy_equal": True},
        "warnings": ["Prose <about> the domain & more."],
    }
