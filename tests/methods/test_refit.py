"""Refit: the ridge least-squares solution, on any numbers that can turn up."""

from __future__ import annotations

import pytest
import torch

from prunetune.core.errors import ConfigError, PrunetuneError
from prunetune.methods.compensation import build_compensation
from tests.contracts.test_compensation import apply, error, problem


def test_equals_the_least_squares_solution():
    weight, x, kept = problem(tokens=400)
    found = apply("refit", weight, kept, x, ridge=1e-7)
    exact = torch.linalg.lstsq(x[:, kept].double(), x.double() @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-3)
    assert error(weight, found, kept, x) < 0.9 * error(weight, weight[:, kept], kept, x)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_ridge_pulls_toward_the_weights_as_they_were(ridge):
    """The same as least squares with extra rows: sqrt(ridge) * I that should give the dense weights."""
    weight, x, kept = problem(tokens=40)
    pull = (ridge * x.square().sum(0).mean()).sqrt().double() * torch.eye(len(kept), dtype=torch.float64)
    rows = torch.cat([x[:, kept].double(), pull])
    wanted = torch.cat([x.double() @ weight.double().T, pull @ weight[:, kept].double().T])
    exact = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(apply("refit", weight, kept, x, ridge=ridge).double(), exact, atol=1e-4, rtol=1e-4)


def test_a_huge_ridge_is_no_compensation():
    weight, x, kept = problem()
    torch.testing.assert_close(apply("refit", weight, kept, x, ridge=1e8), weight[:, kept], atol=1e-4, rtol=1e-4)


def test_a_copy_of_what_leaves_takes_over():
    weight, x, _ = problem(tokens=500)
    x = x.clone()
    x[:, 1] = x[:, 0]  # input 1 leaves and input 0, its copy, stays
    stays = torch.tensor([0, *range(2, 12)])
    found = apply("refit", weight, stays, x, ridge=1e-6)
    expected = weight[:, stays].clone()
    expected[:, 0] += weight[:, 1]
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert error(weight, found, stays, x) < 1e-2 * error(weight, weight[:, stays], stays, x)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
def test_the_scale_of_the_inputs_does_not_matter(scale):
    weight, x, kept = problem()
    usual = apply("refit", weight, kept, x)
    torch.testing.assert_close(apply("refit", weight, kept, x * scale), usual, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad):
    weight, x, kept = problem()
    moment = x.T @ x
    moment[2, 2] = bad
    with pytest.raises(PrunetuneError, match="not finite"):
        build_compensation("refit", {}).weight(weight, kept, moment)


@pytest.mark.parametrize("options", [{"ridge": 0}, {"ridge": -1}, {"tokens": 10}, {"tokens": "many"}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"compensation.{next(iter(options))}"):
        build_compensation("refit", options)
