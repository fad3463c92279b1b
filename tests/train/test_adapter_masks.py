"""Masks that read adapters, in real runs: resumed to the bit, refused where there is nothing to read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from prunetune.core.errors import ConfigError
from prunetune.methods.masks import MASKS
from prunetune.train.joint import JointSearch
from tests.support import tiny_model
from tests.train.joint_runs import (
    FREEZE_STEP,
    checkpoints,
    joint_trainer,
    lora,
    metrics,
    prune_config,
    require_same,
    timeless,
    weights,
)

READERS = [name for name, kind in MASKS.items() if kind.reads_adapters]


@pytest.mark.parametrize("mask", READERS)
def test_a_run_resumed_in_its_search_equals_the_uninterrupted_one(tmp_path: Path, mask: str) -> None:
    prune = prune_config(mask, units=("mlp_channels", "kv_groups", "layers"))
    whole = joint_trainer(tmp_path / "run", prune=prune)
    whole.train()
    assert whole.plan is not None
    assert whole.plan.origin["method"] == mask
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    shutil.rmtree(copy / "freeze")
    for later in checkpoints(copy):
        if later > 2:
            shutil.rmtree(copy / f"checkpoint-{later}")
    resumed = joint_trainer(copy, prune=prune)
    resumed.train(resume_from_checkpoint=True)
    require_same(weights(resumed), weights(whole))
    assert timeless(metrics(copy)) == timeless(metrics(tmp_path / "run"))


def test_the_mask_sees_the_clipped_gradients_of_the_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After accumulation and clipping, before the optimizer's step and before gradients are cleared."""
    seen: list[float] = []
    original = JointSearch.end_step

    def end_step(self: JointSearch, step: int, reduce: object) -> dict[str, float]:
        assert self.mask.context.adapters is not None
        factors = [factor for linear in self.mask.context.adapters.linears for factor in linear.factors()[:2]]
        seen.append(sum(float(factor.grad.square().sum()) for factor in factors) ** 0.5)
        return original(self, step, reduce)  # type: ignore[arg-type]

    monkeypatch.setattr(JointSearch, "end_step", end_step)
    args = {"max_grad_norm": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    joint_trainer(tmp_path / "run", prune=prune_config("lora_gradient"), args=args).train()
    assert len(seen) == FREEZE_STEP
    assert seen == pytest.approx([1e-3] * FREEZE_STEP, rel=1e-3)


@pytest.mark.parametrize("mask", READERS)
def test_sites_without_adapters_are_refused(tmp_path: Path, mask: str) -> None:
    some = lora(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ConfigError, match=r"layers.0.mlp_channels has none; set lora.targets: all-linear"):
        joint_trainer(tmp_path / "run", prune=prune_config(mask), peft_config=some, model=tiny_model())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of plain LoRA after as many steps."""
    torch.set_num_threads(1)
    trainer = joint_trainer(tmp_path_factory.mktemp("plain"), prune=None)
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize("mask", READERS)
def test_with_nothing_to_remove_reading_adapters_changes_no_bit(
    tmp_path: Path, mask: str, plain: dict[str, torch.Tensor]
) -> None:
    # In so short a search atp would learn fast enough for gates to close that no budget asks for.
    options = {"learning_rate": 1e-3} if mask == "atp" else {}
    joint = joint_trainer(tmp_path / "joint", prune=prune_config({"method": mask, **options}, kept="100%"))
    joint.train()
    assert joint.plan is not None
    require_same(weights(joint), plain)
