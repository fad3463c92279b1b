"""Named random streams: reproducible, independent, apart from the global generators."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.core.streams import stream

NAMES = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", 2), (1,), ("a", "1", "2"), ("a", "12"), ("",)]


def test_the_same_names_give_the_same_numbers():
    for names in NAMES:
        assert np.array_equal(stream(3, *names).random(5), stream(3, *names).random(5))


def test_other_seeds_and_other_names_give_other_numbers():
    drawn = {(seed, names): tuple(stream(seed, *names).random(4)) for seed in (0, 1, -1, 10**30) for names in NAMES}
    assert len(set(drawn.values())) == len(drawn)
    assert stream(1, "1").random() != stream(11).random()


def test_a_number_and_its_text_are_one_name():
    """A step read back from a file is text."""
    assert stream(0, "mask", 17).random() == stream(0, "mask", "17").random()


def test_streams_do_not_feel_each_other():
    alone = stream(0, "a").random(10)
    first, second = stream(0, "a"), stream(0, "b")
    mixed = []
    for _ in range(10):
        mixed.append(first.random())
        second.random(3)
    assert np.array_equal(alone, mixed)
    correlation = np.corrcoef(stream(0, "a").random(5000), stream(0, "b").random(5000))[0, 1]
    assert abs(correlation) < 0.05


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    first = stream(0, "a").random()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    torch.manual_seed(2)
    np.random.seed(2)
    assert stream(0, "a").random() == first


def test_other_processes_draw_the_same():
    """Unlike hash(), which differs from process to process."""
    code = "from prunetune.core.streams import stream; print(repr(float(stream(5, 'x', 'y', 3).random())))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) == stream(5, "x", "y", 3).random()


def test_the_numbers_are_those_of_this_release():
    """A resumed run must draw what the interrupted one would have: changing these breaks every old checkpoint."""
    assert stream(0, "mask.hard_concrete", 17, "layers.3.mlp_channels").random() == pytest.approx(PINNED, abs=0)


PINNED = 0.7765723130904951


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(), st.lists(st.one_of(st.text(max_size=8), st.integers()), max_size=4))
def test_any_name_works(seed, names):
    value = stream(seed, *names).random()
    assert 0 <= value < 1
    assert value == stream(seed, *names).random()
