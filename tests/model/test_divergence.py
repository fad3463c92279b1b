"""The distance between two models' answers."""

import math

import pytest
import torch

from prunetune.model.divergence import mean_kl


def test_kl_of_known_distributions():
    half, skewed = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    wanted = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert mean_kl(half, skewed) == pytest.approx(wanted)
    # Adding a constant to logits changes nothing; positions are averaged.
    assert mean_kl(torch.stack([half, half]) + 3, torch.stack([skewed, half]) - 7) == pytest.approx(wanted / 2)
    assert mean_kl(skewed, skewed) == 0.0


def test_what_is_not_finite_is_infinitely_far():
    broken = torch.tensor([0.0, float("nan")])
    assert mean_kl(torch.zeros(2), broken) == math.inf
