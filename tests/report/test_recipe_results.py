"""Averages over seeds, and the comparison with the random control."""

from __future__ import annotations

import math
from typing import Any

import pytest

from prunetune.report.comparison import comparison_table
from prunetune.report.recipe_results import summaries


def result(label: str, kept: float | None, seed: int, ppl: float) -> dict[str, Any]:
    return {"label": label, "kept": kept, "seed": seed, "domain_ppl": ppl, "seconds": 10.0 * (seed + 1), "steps": 4}


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
