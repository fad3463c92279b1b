"""Averages over seeds, and the comparison with the random control."""

from __future__ import annotations

import math
from typing import Any

import pytest

from prunetune.report.comparison import comparison_table
from prunetune.report.recipe_results import summaries


def result(label: str, kept: float | None, seed: int, ppl: float, **numbers: float) -> dict[str, Any]:
    own = {"domain_ppl": ppl, "seconds": 10.0 * (seed + 1), "steps": 4, **numbers}
    return {"label": label, "kept": kept, "seed": seed, **own}


def test_perplexities_are_averaged_by_their_logarithm() -> None:
    (summary,) = summaries([result("joint a", 0.6, 0, 4.0), result("joint a", 0.6, 1, 9.0)])
    assert summary.means["domain_ppl"] == pytest.approx(6.0)
    assert summary.means["seconds"] == 15.0
    assert summary.spreads["domain_ppl"] == pytest.approx(math.log(9 / 4) / math.sqrt(2))


def test_a_recipe_that_random_units_beat_is_marked() -> None:
    results = [
        result("dense LoRA", None, 0, 5.0),
        result("joint random, refit", 0.6, 0, 9.0),
        result("one-shot wanda, uniform, refit", 0.6, 0, 9.5),
        result("joint saliency, refit", 0.6, 0, 7.0),
        result("joint saliency, refit", 0.8, 0, 6.0),
    ]
    beats = {(s.label, s.kept): s.beats_random for s in summaries(results)}
    assert beats["one-shot wanda, uniform, refit", 0.6] is False
    assert beats["joint saliency, refit", 0.6] is True
    assert beats["joint saliency, refit", 0.8] is None
    assert beats["dense LoRA", None] is None
    assert beats["joint random, refit", 0.6] is None
    cells = [list(column.cells) for column in comparison_table(results).columns]
    assert cells[2][2] == "! 9.50"
    # A reference stands in every column.
    assert cells[1][0] == cells[2][0] == "5.00"


@pytest.mark.parametrize("diverged", [math.nan, math.inf, math.exp(700)])
def test_a_diverged_seed_makes_a_recipe_infinitely_bad_and_is_in_no_spread(diverged: float) -> None:
    results = [result("joint a", 0.6, seed, ppl) for seed, ppl in enumerate((diverged, 4.0, 9.0))]
    (summary,) = summaries(results)
    assert summary.domain_ppl == summary.means["domain_ppl"] == math.inf
    assert (summary.diverged, summary.seeds) == (1, 3)
    assert summary.spreads["domain_ppl"] == pytest.approx(math.log(9 / 4) / math.sqrt(2))


def test_a_diverged_control_is_none_and_a_diverged_recipe_beats_no_finite_one() -> None:
    wanda, control = "one-shot wanda, uniform, refit", "joint random, refit"
    found = summaries([result(control, 0.6, 0, math.nan), result(wanda, 0.6, 0, 10.0)])
    assert [summary.beats_random for summary in found] == [None, None]
    found = summaries([result(control, 0.6, 0, 20.0), result(wanda, 0.6, 0, math.nan)])
    assert [summary.beats_random for summary in found] == [None, False]


def test_a_control_of_another_size_is_named_with_its_size() -> None:
    results = [
        result("joint random, refit", 0.6, 0, 9.0, kept_decoder=0.786),
        result("joint a, refit", 0.6, 0, 10.0, kept_decoder=0.667),
        result("joint b, refit", 0.6, 0, 10.0, kept_decoder=0.78),
        result("joint c, refit", 0.6, 0, 8.0, kept_decoder=0.5),
    ]
    found = {s.label: (s.beats_random, s.random_kept) for s in summaries(results)}
    assert found["joint a, refit"] == (False, 0.786)
    assert found["joint b, refit"] == (False, None)
    assert found["joint c, refit"] == (True, None)


def test_a_number_that_only_some_seeds_have_has_no_mean() -> None:
    (summary,) = summaries([result("joint a", 0.6, 0, 4.0, exact_match=0.5), result("joint a", 0.6, 1, 9.0)])
    assert "exact_match" not in summary.means


def test_what_has_no_result_is_counted() -> None:
    missing = {"label": "joint a", "kept": 0.6, "seed": 1}
    (summary,) = summaries([result("joint a", 0.6, 0, 4.0), missing])
    assert (summary.seeds, summary.planned) == (1, 2)
    (summary,) = summaries([missing])
    assert (summary.seeds, summary.means, summary.domain_ppl) == (0, {}, math.inf)
