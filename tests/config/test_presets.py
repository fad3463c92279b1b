"""Step boundaries and other derived values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from prunetune.config.load import load_config
from prunetune.config.presets import (
    PhaseSteps,
    derive,
    export_folder,
    learning_rate_warmup,
    phase_steps,
    save_every,
    total_steps,
)
from prunetune.config.schema import PhaseConfig, TrainSection
from prunetune.train.settings import sft_config

SHARES = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.1, 0.4), (0.5, 0.5), (0.9, 0.05), (0.25, 0.5)]


@pytest.mark.parametrize(("warmup", "search"), SHARES)
def test_phases_never_vanish(warmup: float, search: float) -> None:
    phases = PhaseConfig(warmup=warmup, search=search)
    for total in range(1, 200):
        steps = phase_steps(phases, total)
        assert 0 <= steps.warmup_end < steps.freeze <= steps.total == total
        assert steps.recover >= 1 or total == 1
        assert steps.warmup >= 1 or total < 3 or warmup == 0
        assert steps.warmup + steps.search + steps.recover == total


def test_phase_boundaries_are_the_shares() -> None:
    assert phase_steps(PhaseConfig(warmup=0.1, search=0.4), 80) == PhaseSteps(8, 40, 80)
    with pytest.raises(ValueError, match="at least one step"):
        phase_steps(PhaseConfig(), 0)


@pytest.mark.parametrize("search", [0.1, 0.4, 0.7])
def test_the_rate_is_full_until_the_freeze_and_half_of_the_steps_and_zero_at_the_end(
    search: float, tmp_path: Path
) -> None:
    config = load_config(None, ["model=a", "target=60%", "folder=runs/a", f"phases.search={search}"])
    args = sft_config(config, tmp_path, 80)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, 4, 80, dict(args.lr_scheduler_kwargs))
    rates = []
    for _ in range(81):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    falls = max(phase_steps(config.phases, 80).freeze, 40)
    assert rates[4 : falls + 1] == [1.0] * (falls - 3)
    assert rates[falls + 1] < 1.0
    assert rates[80] == pytest.approx(0.0)


def test_total_steps_counts_as_the_trainer_does() -> None:
    train = TrainSection(batch_size=8, accumulate=2, epochs=1.5)
    assert total_steps(train, rows=100) == 11  # 13 batches -> 7 steps an epoch -> ceil(10.5)
    assert total_steps(train, rows=100, processes=2) == 6
    assert total_steps(TrainSection(max_steps=5), rows=100) == 5


def test_learning_rate_warmup_counts_as_training_arguments_do() -> None:
    assert learning_rate_warmup(TrainSection(warmup_steps=0.05), 90) == 5
    assert learning_rate_warmup(TrainSection(warmup_steps=7), 90) == 7


def test_save_every_is_a_tenth_unless_set() -> None:
    assert save_every(TrainSection(), 85) == 8
    assert save_every(TrainSection(), 3) == 1
    assert save_every(TrainSection(save_every=40), 85) == 40


def test_every_derived_value_has_a_reason() -> None:
    config = load_config(None, ["model=a", "target=60%", "folder=runs/a"])
    known, unknown = derive(config, 80), derive(config, None)
    assert [item.name for item in known] == [item.name for item in unknown]
    assert all(item.value and item.reason for item in known + unknown)
    assert {item.name: item.value for item in known}["search"] == "16 steps"
    assert str(export_folder(config)) == "runs/a/compact"
    assert {item.name for item in known} > {"warm-up", "checkpoint", "validation", "export"}


def test_what_is_set_is_not_listed_as_derived() -> None:
    config = load_config(
        None, ["model=a", "target=60%", "train.save_every=5", "train.eval_every=5", "export.folder=out"]
    )
    assert not {item.name for item in derive(config, 80)} & {"checkpoint", "validation", "export"}
