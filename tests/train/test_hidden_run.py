"""Runs that narrow the residual stream: frozen, resumed, exported, cut anew; and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunetune.core.errors import ConfigError
from prunetune.export.write import export_model
from prunetune.model.surgery import base_model
from prunetune.model.units import HIDDEN
from prunetune.train.freeze import SCORES_FILE, adopt_freeze, load_folds
from prunetune.train.trainer import JointTrainer
from tests.support import logits, tiny_model, tiny_tokenizer
from tests.train.joint_runs import (
    FREEZE_STEP,
    checkpoints,
    joint_trainer,
    lora,
    metrics,
    prune_config,
    require_same,
    rows,
    timeless,
    weights,
)


def require_same_when_resumed(run: Path, whole: JointTrainer, trainer: Callable[[Path], JointTrainer]) -> None:
    """Stops copies of a finished run in its search and after its freeze; going on must come to the same bits."""
    for last in (2, FREEZE_STEP + 2):
        copy = run.with_name(f"copy-{last}")
        shutil.copytree(run, copy)
        for later in checkpoints(copy):
            if later > last:
                shutil.rmtree(copy / f"checkpoint-{later}")
        if last < FREEZE_STEP:
            shutil.rmtree(copy / "freeze")
        resumed = trainer(copy)
        resumed.train(resume_from_checkpoint=True)
        require_same(weights(resumed), weights(whole))
        assert timeless(metrics(copy)) == timeless(metrics(run))


@pytest.mark.parametrize(
    ("model_type", "units", "kept", "dtype"),
    [
        ("llama", ("hidden",), "55%", torch.float32),
        ("qwen3", ("hidden", "mlp_channels"), "45%", torch.bfloat16),
    ],
)
def test_a_run_is_cut_resumed_and_exported(
    tmp_path: Path, model_type: str, units: tuple[str, ...], kept: str, dtype: torch.dtype
) -> None:
    def trainer(folder: Path) -> JointTrainer:
        prune = prune_config("saliency", {"method": "refit", "tokens": 256}, units, kept=kept)
        return joint_trainer(folder, model=tiny_model(model_type).to(dtype), prune=prune)

    whole = trainer(tmp_path / "run")
    whole.train()
    assert whole.plan is not None
    assert HIDDEN in whole.plan.kept
    config = base_model(whole.model).config
    assert config.hidden_size == len(whole.plan.kept[HIDDEN]) < 48
    logged = metrics(tmp_path / "run")
    assert logged[-1]["kept_fraction"] <= 0.55
    require_same_when_resumed(tmp_path / "run", whole, trainer)
    export_model(whole.model, tiny_tokenizer(), tmp_path / "out", dtype="float32", plan=whole.plan, verify=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    whole.model.eval()
    if dtype == torch.float32:  # else the rotary frequencies of the live model are rounded, too
        torch.testing.assert_close(logits(again), logits(whole.model), atol=2e-5, rtol=2e-5)
    # Another budget from the same scores.
    other = joint_trainer(tmp_path / "other", model=tiny_model(model_type).to(dtype),
                          prune=prune_config("saliency", units=units, kept="80%"))  # fmt: skip
    plan = other.cut_from_scores(load_file(tmp_path / "run" / "freeze" / SCORES_FILE))
    assert set(whole.plan.kept[HIDDEN]) <= set(plan.kept.get(HIDDEN, range(48)))


@pytest.mark.parametrize(
    ("mask", "changes", "message"),
    [
        ("hard_concrete", {}, r"mask.method: hard_concrete cannot rank hidden dimensions.*saliency"),
        ("saliency", {"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens is trained"),
        ("saliency", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, r"norm is trained"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    tmp_path: Path, mask: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        joint_trainer(tmp_path, prune=prune_config(mask, units=("hidden",)), peft_config=lora(**changes))


def test_a_run_with_pat_folds_its_maps_and_goes_on(tmp_path: Path) -> None:
    def trainer(folder: Path, kept: str = "60%") -> JointTrainer:
        prune = prune_config("pat", {"method": "refit", "tokens": 256}, ("hidden",), kept=kept)
        more = {"eval_dataset": rows(6, seed=9), "evaluate_at_freeze": True}
        return joint_trainer(folder, model=tiny_model(attention_bias=True), prune=prune, **more)

    whole = trainer(tmp_path / "run")
    whole.train()
    assert whole.plan is not None
    assert len(whole.plan.kept[HIDDEN]) == 24
    logged = metrics(tmp_path / "run")
    [before] = [entry["eval_before_cut_loss"] for entry in logged if "eval_before_cut_loss" in entry]
    [after] = [entry["eval_after_cut_loss"] for entry in logged if "eval_after_cut_loss" in entry]
    assert before == pytest.approx(after, rel=1e-5)
    freeze = tmp_path / "run" / "freeze"
    folds = load_folds(freeze)
    assert len(folds) == 6
    assert all(fold.left.any() for fold in folds.values())
    writers = [module for name, module in whole.model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    assert len(writers) == 6
    assert not any(module._forward_hooks for module in writers), "what is folded must not act a second time"
    require_same_when_resumed(tmp_path / "run", whole, trainer)
    # Another budget from the same scores, and the same one: then it is the model of the freeze.
    again = trainer(tmp_path / "other")
    set_peft_model_state_dict(again.model, load_file(freeze / "adapter" / "adapter_model.safetensors"))
    plan = again.cut_from_scores(load_file(freeze / SCORES_FILE), folds)
    assert plan.digest() == whole.plan.digest()
    frozen = tiny_model(attention_bias=True)
    adopt_freeze(frozen, freeze)
    frozen = PeftModel.from_pretrained(frozen, freeze / "checkpoint")
    again.model.eval()
    torch.testing.assert_close(logits(again.model), logits(frozen.eval()), atol=1e-5, rtol=1e-5)
