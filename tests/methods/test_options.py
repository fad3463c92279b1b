"""A method's options: defaults, all faults at once, suggestions."""

from __future__ import annotations

import pytest
from pydantic import Field

from prunetune.core.errors import ConfigError
from prunetune.methods.options import MethodOptions, parse_options


class Knobs(MethodOptions):
    """For these tests."""

    decay: float = Field(0.9, ge=0, lt=1)
    steps: int = Field(1, ge=1)


class Required(MethodOptions):
    """For these tests."""

    plan: str


def test_defaults_and_given_values():
    assert parse_options("mask", "x", Knobs, {}) == Knobs()
    assert parse_options("mask", "x", Knobs, {"decay": 0.5}).decay == 0.5


def test_all_faults_at_once_each_with_its_field():
    with pytest.raises(ConfigError) as caught:
        parse_options("mask", "x", Knobs, {"decay": 2, "steps": 0, "decai": 1, "zzzz": 1})
    problems = {problem.field: problem.message for problem in caught.value.problems}
    assert problems.keys() == {"mask.decay", "mask.steps", "mask.decai", "mask.zzzz"}
    assert "(set: 2)" in problems["mask.decay"]
    assert problems["mask.decai"] == "'x' has no such option; did you mean 'decay'?"
    assert problems["mask.zzzz"] == "'x' has no such option; known: decay, steps"


def test_a_missing_option_says_so_without_inventing_a_value():
    with pytest.raises(ConfigError) as caught:
        parse_options("mask", "x", Required, {})
    assert "mask.plan" in str(caught.value)
    assert "set: {}" not in str(caught.value)


def test_a_method_without_options_says_so():
    with pytest.raises(ConfigError, match="it has no options"):
        parse_options("mask", "x", MethodOptions, {"any": 1})


def test_options_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Knobs().decay = 0.1
