"""The contract of every registered compensation, found by discovery."""

from __future__ import annotations

import pytest
import torch

from prunetune.core.errors import ConfigError
from prunetune.methods.compensation import COMPENSATIONS, Compensation, build_compensation, check_compensation

by_name = pytest.mark.parametrize("name", COMPENSATIONS.names())


def problem(inputs=12, outputs=7, tokens=200, seed=0, correlated=True):
    """A linear (out, in), its calibration inputs (T, in), and 7 inputs that stay."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    if correlated:
        x = x @ torch.randn(inputs, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight, x, torch.tensor([0, 2, 3, 5, 8, 10, 11])


def apply(name, weight, kept, x, **options):
    method = build_compensation(name, options, one_shot=True)
    return method.weight(weight, kept, x.T @ x if method.tokens else None)


def error(weight, found, kept, x):
    """Squared change of the linear's output on the calibration inputs."""
    return float((x @ weight.T - x[:, kept] @ found.T).square().sum())


def test_the_methods_are_found():
    assert {"none", "refit", "mask_tuning", "bias"} <= set(COMPENSATIONS.names())


@by_name
def test_docstring_and_summary(name):
    kind = COMPENSATIONS.get(name)
    assert issubclass(kind, Compensation)
    assert COMPENSATIONS.summary(name) == kind.__dict__["__doc__"].strip().splitlines()[0]
    assert len(COMPENSATIONS.summary(name)) > 20
    assert all(field.description for field in kind.Options.model_fields.values())


@by_name
def test_shape_dtype_and_arguments_untouched(name):
    weight, x, kept = problem()
    before, moment = weight.clone(), x.T @ x
    copy = moment.clone()
    found = build_compensation(name, {}, one_shot=True).weight(weight, kept, moment)
    assert found.shape == (7, 7)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert torch.equal(weight, before)
    assert torch.equal(moment, copy)


@by_name
def test_deterministic(name):
    weight, x, kept = problem()
    assert torch.equal(apply(name, weight, kept, x), apply(name, weight, kept, x))


@pytest.mark.parametrize("tokens", [1, 5, 12, 500])
@pytest.mark.parametrize("correlated", [True, False])
@by_name
def test_never_worse_than_none_on_the_calibration_tokens(name, correlated, tokens):
    for seed in range(5):
        weight, x, kept = problem(tokens=tokens, seed=seed, correlated=correlated)
        least = error(weight, weight[:, kept], kept, x)
        assert error(weight, apply(name, weight, kept, x), kept, x) <= least * (1 + 1e-4)


@by_name
def test_nothing_removed_changes_nothing(name):
    weight, x, _ = problem()
    found = apply(name, weight, torch.arange(12), x)
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=1e-4)


@by_name
def test_removed_inputs_that_were_always_zero_change_nothing(name):
    weight, x, kept = problem()
    x = x.clone()
    x[:, [i for i in range(12) if i not in kept.tolist()]] = 0.0
    torch.testing.assert_close(apply(name, weight, kept, x), weight[:, kept], atol=1e-4, rtol=1e-4)


@by_name
def test_inputs_that_are_all_zero_change_nothing(name):
    """A dead sublayer: there is nothing to learn from, and nothing to complain about."""
    weight, x, kept = problem()
    assert torch.equal(apply(name, weight, kept, torch.zeros_like(x)), weight[:, kept])


@by_name
def test_unknown_options_are_refused_with_a_suggestion(name):
    fields = COMPENSATIONS.get(name).Options.model_fields
    known = next(iter(fields), None)
    with pytest.raises(ConfigError) as caught:
        build_compensation(name, {f"{known or 'x'}s": 1}, one_shot=True)
    assert (f"did you mean {known!r}" if known else "it has no options") in str(caught.value)
    assert len(check_compensation(name, {f"{known or 'x'}s": 1}, one_shot=True)) == 1
    assert check_compensation(name, {}, one_shot=True) == []


def test_unknown_methods_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'refit'"):
        build_compensation("refitt", {})


def test_a_bias_is_refused_where_a_model_trains():
    with pytest.raises(ConfigError, match="only `prunetune prune` can"):
        build_compensation("bias", {})
