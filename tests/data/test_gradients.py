"""Adam's steps as gradient features: the optimizer's own numbers, training rows only, refused for other adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from prunetune.core.errors import DataError
from prunetune.data.gradients import AdamMoments, GradientFeatures
from prunetune.data.scorer import ScoringOptions
from prunetune.data.scoring import score
from prunetune.model.token_rows import TokenRow
from tests.data.test_scoring import rows
from tests.support import tiny_model, tiny_tokenizer

BETAS = (0.9, 0.999)
ROWS = [TokenRow([1, *range(5 + i, 15 + i)], [-100] * 4 + list(range(8 + i, 15 + i))) for i in range(6)]


def adapted(rank: int = 4):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(), LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False))


def moments(model, scale: float = 1.0) -> AdamMoments:
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(1)
    first = {name: scale * torch.randn(p.shape, generator=generator) for name, p in trained.items()}
    return AdamMoments(first, {name: value.square() * 2 for name, value in first.items()}, BETAS)


def test_the_step_is_the_one_adam_would_take():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    adam = torch.optim.AdamW([weight], lr=0.1, betas=BETAS, weight_decay=0.0)
    for _ in range(7):
        weight.grad = torch.randn(5, 3)
        adam.step()
    state = {key: value.clone() for key, value in adam.state[weight].items()}
    grad = torch.randn(5, 3)
    found = AdamMoments({"w": state["exp_avg"]}, {"w": state["exp_avg_sq"]}, BETAS).step("w", grad)
    weight.grad = grad
    adam.step()
    after = adam.state[weight]
    torch.testing.assert_close(found, after["exp_avg"] / (after["exp_avg_sq"] + 1e-8).sqrt())


def test_moments_steer_training_rows_and_not_validation_rows():
    model = adapted()
    plain = GradientFeatures(model, ROWS[:2])
    steered = GradientFeatures(model, ROWS[:2], moments=moments(model, 1e3))
    np.testing.assert_array_equal(plain._wanted, steered._wanted)
    # Moments that dwarf the gradients: every row would cause much the same step.
    assert np.std([steered.influence(row) for row in ROWS]) < 0.05 * np.std([plain.influence(row) for row in ROWS])


def test_no_history_leaves_signs_of_gradients():
    model = adapted()
    trained = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    name = next(iter(trained))
    grad = torch.randn(trained[name].shape) * 10
    step = AdamMoments(trained, trained, BETAS).step(name, grad)
    torch.testing.assert_close(step, grad.sign() * (1 - BETAS[0]) / (1 - BETAS[1]) ** 0.5, rtol=1e-3, atol=0)


def test_moments_of_other_adapters_are_refused():
    with pytest.raises(DataError, match="other adapters"):
        GradientFeatures(adapted(rank=4), ROWS[:1], moments=moments(adapted(rank=2)))


def test_scores_with_other_moments_or_validation_rows_are_not_mixed(tmp_path):
    model, tokenizer, options = adapted(), tiny_tokenizer(), ScoringOptions(extras=("influence",))
    arguments = {"folder": tmp_path / "scores", "options": options}
    score(rows(), model, tokenizer, **arguments, validation=rows()[:2], moments=moments(model))
    for change in ({"moments": None}, {"moments": moments(model, 2.0)}, {"validation": rows()[2:4]}):
        asked = {"validation": rows()[:2], "moments": moments(model)} | change
        with pytest.raises(DataError, match="influence_hash"):
            score(rows(), model, tokenizer, **arguments, **asked)
