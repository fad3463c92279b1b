"""The file of optimizer state: by name, whole, sliced with its parameters, refused when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from prunetune.core.errors import DataError
from prunetune.model.surgery import Surgery, slice_model
from prunetune.train.moments import MOMENTS_FILE, Moments
from tests.support import random_plan, tiny_arch, tiny_model
from tests.train.joint_runs import joint_trainer, lora

UNITS = ("mlp_channels", "kv_groups", "query_heads", "layers")


def some() -> Moments:
    """Random AdamW state of the tiny model's adapters."""
    model = get_peft_model(tiny_model(), lora())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {
        name: {"exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p), "step": torch.tensor(3.0)}
        for name, p in trained.items()
    }
    groups = [{"lr": 1e-4 / 3, "betas": [0.9, 0.999], "params": list(trained)}]
    return Moments(tensors, groups, {"last_epoch": 3, "base_lrs": [0.1]})


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    written = some()
    written.save(tmp_path)
    read = Moments.load(tmp_path)
    assert (read.groups, read.scheduler) == (written.groups, written.scheduler)
    assert read.tensors.keys() == written.tensors.keys()
    for name, kept in written.tensors.items():
        assert all(torch.equal(read.tensors[name][key], value) for key, value in kept.items())


def test_sliced_state_fits_the_sliced_model() -> None:
    plan = random_plan(tiny_arch(), UNITS)
    model = get_peft_model(tiny_model(), lora())
    slice_model(model, plan)
    sliced = some().sliced(Surgery(tiny_arch(), plan))
    trained = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name: kept["exp_avg"].shape for name, kept in sliced.tensors.items()} == trained
    assert sliced.groups[0]["params"] == list(trained)
    assert {float(kept["step"]) for kept in sliced.tensors.values()} == {3.0}


@pytest.mark.parametrize("damage", ["truncated", "not ours", "gone"])
def test_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    some().save(tmp_path)
    file = tmp_path / MOMENTS_FILE
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:99] if damage == "truncated" else b"\x80\x04pickle")
    with pytest.raises(DataError, match="is damaged"):
        Moments.load(tmp_path)


def test_a_checkpoint_pickles_neither_moments_nor_schedule(tmp_path: Path) -> None:
    joint_trainer(tmp_path, prune=None, args={"max_steps": 2}).train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert MOMENTS_FILE in files
    assert not {"optimizer.pt", "scheduler.pt"} & files
