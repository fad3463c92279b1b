"""What ZeRO hands to a mask between backward pass and step; whole runs under it are in tests/distributed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prunetune.config.engines import refusal
from prunetune.core.errors import ConfigError
from prunetune.train import launched
from prunetune.train.zero import Zero
from tests.train.joint_runs import joint_trainer, lora, prune_config


@pytest.fixture
def engine() -> Any:
    pytest.importorskip("deepspeed")
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    return Zero(SimpleNamespace(model=model, deepspeed=SimpleNamespace(gradient_clipping=lambda: 0.5)))


def test_gradients_are_seen_as_the_step_clips_them(engine: Any) -> None:
    seen: list[torch.Tensor] = []
    wanted = [parameter.grad.clone() for parameter in engine.trainer.model.parameters()]
    scale = 0.5 / (torch.cat([grad.flatten() for grad in wanted]).norm() + 1e-6)
    model = engine.trainer.model
    assert not engine._among_gradients(lambda: seen.extend(parameter.grad for parameter in model.parameters()))
    for grad, whole in zip(seen, wanted, strict=True):
        torch.testing.assert_close(grad, whole * scale)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_are_taken_away_are_noticed(engine: Any) -> None:
    first, last = engine.trainer.model

    def take_away(*modules: nn.Module) -> None:
        for module in modules:
            module.zero_grad()

    assert engine._among_gradients(lambda: take_away(first, last))


def test_what_learns_beside_adapters_that_are_left_alone_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    of = {"prune": prune_config("atp"), "peft_config": lora(modules_to_save=["lm_head"])}
    joint_trainer(tmp_path, **of)
    monkeypatch.setattr(launched, "refusal", lambda engine, feature: refusal("zero2", feature))
    with pytest.raises(ConfigError, match=r"zero2 counts the same steps for all that is trained; launch with ddp"):
        joint_trainer(tmp_path, **of)
    joint_trainer(tmp_path, prune=prune_config("atp"))
