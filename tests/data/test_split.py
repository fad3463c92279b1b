from __future__ import annotations

import random

from prunetune.data.split import distinct, hold_out, sample


def test_held_out_groups_do_not_depend_on_row_order():
    groups = [f"q{index // 2}" for index in range(200)]
    held = hold_out(groups, 20)
    assert sum(group in held for group in groups) == 20
    shuffled = groups[:]
    random.Random(1).shuffle(shuffled)
    assert hold_out(shuffled, 20) == held


def test_a_large_group_is_not_held_out():
    groups = ["big"] * 30 + [f"small{index}" for index in range(70)]
    held = hold_out(groups, 12, largest=0.25)
    assert "big" not in held
    assert len(held) == 12


def test_the_smallest_group_is_held_out_when_none_fits():
    assert hold_out(["a"] * 5 + ["b"] * 3, 1) == {"b"}
    assert hold_out(["a"] * 8, 1) == set()


def test_exact_repetitions_are_found_whatever_the_key_order():
    assert distinct([{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}]) == [0, 2]


def test_a_smaller_sample_is_part_of_a_larger_one():
    rows = [f"row {index}" for index in range(50)]
    ten, twenty = sample(rows, 10, "seed", 0), sample(rows, 20, "seed", 0)
    assert len(ten) == 10
    assert set(ten) < set(twenty)
    assert ten == sorted(ten)
    assert sample(rows, 10, "seed", 1) != ten
    assert sample(rows, None) == list(range(50))
