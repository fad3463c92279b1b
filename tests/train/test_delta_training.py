"""Adapters made ready for losing most of their delta: exact pulls, masks by name, runs that resume to the bit."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prunetune.config.schema import DeltaConfig
from prunetune.core.errors import ConfigError
from prunetune.train.delta_training import DeltaTrainer, Factors, TrainDrop, pull, trained_factors
from tests.support import logits, tiny_model, tiny_tokenizer
from tests.train.joint_runs import joint_trainer, lora, metrics, prune_config, require_same, rows, sft_args, weights

M, N, R, S = 14, 23, 3, 1.7


def factors(seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(R, N, generator=generator), torch.randn(M, R, generator=generator)
    return Factors("w", a.requires_grad_(), b.requires_grad_(), S)


def trainer(out: Path, delta: dict[str, Any], *, args: dict[str, Any] | None = None, **lora_options: Any):
    values: dict[str, Any] = {"save_steps": 1, **(args or {})}
    prune = prune_config(delta=DeltaConfig(**delta))
    return DeltaTrainer(
        tiny_model(),
        sft_args(out, **values),
        prune=prune,
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(**lora_options),
    )


def delta_norm(trained: Any) -> float:
    parts = [found.scale * found.b @ found.a for found in trained_factors(trained.model)]
    return float(torch.stack([part.detach().square().sum() for part in parts]).sum().sqrt())


@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_a_pull_is_a_step_down_the_gradient_of_the_penalty(kind: Any, block_bytes: int) -> None:
    found, rate = factors(), 1e-4
    product = S * found.b @ found.a
    penalty = product.square().sum() / 2 if kind == "l2" else product.abs().sum()
    penalty.backward()
    before = [found.a.detach().clone(), found.b.detach().clone()]
    squared = pull(found, kind, rate, block_bytes)
    assert float(squared) == pytest.approx(float(product.detach().square().sum()), rel=1e-5)
    for parameter, was in zip((found.a, found.b), before):
        torch.testing.assert_close((was - parameter.detach()) / rate, parameter.grad, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_a_pull_never_goes_far_past_zero(kind: Any) -> None:
    found = factors()
    sizes = [float(pull(found, kind, 1e9)) for _ in range(40)]
    assert all(later <= 1.001 * earlier for earlier, later in itertools.pairwise(sizes)), sizes
    assert sizes[-1] < 0.01 * sizes[0]
    nothing = Factors("w", torch.ones(R, N), torch.zeros(M, R), S)
    pull(nothing, kind, 1e9)
    assert torch.equal(nothing.a, torch.ones(R, N))


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_a_regularised_run_learns_a_smaller_delta(kind: str, tmp_path: Path) -> None:
    sizes = []
    for strength in (0.0, 3.0):
        done = trainer(tmp_path / str(strength), {"regularize": kind, "strength": strength})
        done.train()
        sizes.append(delta_norm(done))
        assert metrics(tmp_path / str(strength))[-3]["delta_norm"] > 0
    assert sizes[1] < 0.7 * sizes[0], sizes


def test_a_section_that_asks_for_nothing_changes_nothing(tmp_path: Path) -> None:
    plain = joint_trainer(tmp_path / "plain", prune=prune_config())
    plain.train()
    same = trainer(tmp_path / "same", {"method": "dare", "drop": "90%"})
    same.train()
    require_same(weights(same), weights(plain))


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    found = []
    for size, number in ((4, 1), (1, 4)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": number}
        delta = {"regularize": "l2", "strength": 0.1, "train_drop": "30%"}
        done = trainer(tmp_path / str(size), delta, args=args, lora_dropout=0.0)
        done.train()
        found.append(weights(done))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.parametrize("delta", [{"regularize": "l2"}, {"regularize": "l1", "train_drop_unit": "entries"}])
def test_a_resumed_run_is_the_uninterrupted_one(delta: dict[str, Any], tmp_path: Path) -> None:
    delta = {"strength": 0.1, "train_drop": "40%", **delta}
    whole = trainer(tmp_path / "run", delta)
    whole.train()
    for step in (2, 6):  # before the freeze (step 4) and after it
        shutil.copytree(tmp_path / "run", tmp_path / f"from{step}")
        for later in range(step + 1, 9):
            shutil.rmtree(tmp_path / f"from{step}" / f"checkpoint-{later}")
        if step == 2:
            shutil.rmtree(tmp_path / "from2" / "freeze")
        resumed = trainer(tmp_path / f"from{step}", delta)
        resumed.train(resume_from_checkpoint=True)
        require_same(weights(resumed), weights(whole))


def peft_model() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=R, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


@pytest.mark.parametrize("unit", ["columns", "entries"])
def test_dropped_inputs_are_those_of_a_masked_a(unit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    plain = logits(model.eval())
    dropping = TrainDrop(model, DeltaConfig(train_drop="50%", train_drop_unit=unit), seed=3)
    dropping.begin_step(5, 0.5)
    torch.testing.assert_close(logits(model.eval()), plain)  # nothing is dropped outside of training
    model.train()
    dropped = logits(model)
    masked = peft_model()
    shares = []
    for name, module in masked.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            weight = module.lora_A["default"].weight
            mask = dropping._mask(f"{name}.default", 1 if unit == "columns" else R, weight)
            shares.append((mask == 0).float().mean())
            assert set(mask.unique().tolist()) <= {0.0, 2.0}
            with torch.no_grad():
                weight *= mask
    torch.testing.assert_close(dropped, logits(masked.eval()), atol=1e-4, rtol=1e-4)
    assert float(torch.stack(shares).mean()) == pytest.approx(0.5, abs=0.05)
    dropping.begin_step(6, 0.5)
    assert not torch.allclose(logits(model), dropped)
    dropping.begin_step(5, 0.5)
    assert torch.equal(logits(model), dropped)
    dropping.detach()
    assert torch.equal(logits(model.eval()), plain)


def test_dropping_is_ramped_up_after_the_freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[int, float]] = []
    original = TrainDrop.begin_step

    def begin_step(self: TrainDrop, step: int, share: float) -> None:
        shares.append((step, share))
        original(self, step, share)

    monkeypatch.setattr(TrainDrop, "begin_step", begin_step)
    trainer(tmp_path, {"train_drop": "40%"}).train()
    assert shares == [(4, pytest.approx(0.2)), (5, 0.4), (6, 0.4), (7, 0.4)]


def test_what_the_pull_cannot_follow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"delta.regularize.*adamw_torch"):
        trainer(tmp_path, {"regularize": "l2"}, args={"optim": "sgd"})
