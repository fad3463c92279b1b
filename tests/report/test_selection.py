"""The report of a selection: what it says, what it draws, and that nothing is fetched."""

from __future__ import annotations

import re

import numpy as np
import pytest

from prunetune.report.selection import MOST_CHARACTERS, SelectionRecord, ShownExample, selection_figures, selection_html


def facts(**changes):
    groups = [
        {"name": "gsm8k", "rows": 30, "kept_rows": 5, "share": 0.75, "kept_share": 0.5},
        {"name": "<medquad>", "rows": 10, "kept_rows": 5, "share": 0.25, "kept_share": 0.5},
    ]
    return {
        "prunetune": "0",
        "settings": {"samples_method": "q_tuning", "tokens_method": "loss", "samples_kept": 0.25, "floor": 0.1},
        "scores": {"model": "tiny", "scored_tokens": 4000, "seconds": 12.5},
        "removes": False,
        "counts": {
            "rows": 40, "kept_rows": 10, "target_tokens": 400, "target_tokens_of_kept_rows": 100,
            "kept_target_tokens": 70, "forward_tokens": 800, "kept_forward_tokens": 200,
        },
        "requested": {"samples": 0.25, "tokens_of_kept_rows": 0.7, "target_tokens": 0.175},
        "achieved": {"samples": 0.25, "tokens_of_kept_rows": 0.7, "target_tokens": 0.175, "forward_tokens": 0.25},
        "reasons": {"Q2": 10, "Q1": 30},
        "meanings": {"Q2": "a confident mistake", "Q1": "likely noise"},
        "composition": {"source": groups},
        "score_length_spearman": 0.81,
        "topup_share": 0.0,
        "cost": {
            "scoring_seconds": 12.5,
            "relative_flops": {"LoRA, 1 epoch": 0.75},
            "seconds_saved_per_lora_epoch": 18.75,
        },
        "warnings": ["the score follows the number of target tokens"],
        **changes,
    }  # fmt: skip


def audit(rows=40, **changes):
    rng = np.random.default_rng(0)
    return {
        "decision": [("drop", "drop", "keep", "mask")[i % 4] for i in range(rows)],
        "value": rng.normal(size=rows).tolist(),
        "ppl": rng.lognormal(size=rows).tolist(),
        "entropy": rng.random(rows).tolist(),
        "n_target": rng.integers(1, 30, rows).tolist(),
        **changes,
    }


EXAMPLES = [
    ShownExample("aa", "mask", "kept: good", [("question <b>", "context"), ("yes", "kept"), (" no", "dropped")]),
    ShownExample("bb", "drop", "dropped: noise", [("why", "context"), ("because", "dropped")]),
]


def test_the_page_says_what_was_reached_and_fetches_nothing():
    page = selection_html(SelectionRecord(facts(), audit(), EXAMPLES))
    assert "10 of 40 rows stay (25.0%), with 17.5% of the target tokens" in page
    assert "30.0% of the targets of these rows stay as context" in page
    assert "the score follows the number of target tokens" in page
    assert page.index("likely noise") < page.index("a confident mistake"), "the most frequent reason first"
    assert "Scoring took 12.5 s over 4.0K tokens" in page
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "http" not in page


def test_dropped_tokens_are_struck_through_and_text_is_escaped():
    page = selection_html(SelectionRecord(facts(), audit(), EXAMPLES))
    assert "<del> no</del>" in page
    assert "question &lt;b&gt;" in page
    # A dropped row is gone as a whole: its answer stays readable.
    assert '<span class="kept">because</span>' in page
    assert "1 random rows that stay" in page
    assert "1 random rows that were dropped" in page


def test_long_examples_are_cut_and_say_so():
    long = ShownExample("cc", "keep", "kept", [("x" * (MOST_CHARACTERS - 10), "context"), ("y" * 30, "kept")])
    page = selection_html(SelectionRecord(facts(), audit(), [long]))
    assert ">" + "y" * 10 + "<" in page
    assert "20 more characters" in page


def test_titles_say_what_to_see():
    figures = selection_figures(SelectionRecord(facts(), audit(), []))
    titles = {name: [axis.get_title(loc="left") for axis in figure.axes] for name, figure in figures.items()}
    assert titles["plane"] == ["20 of 40 rows stay"]
    assert titles["composition"] == ["Sources: gsm8k went from 75% to 50%"]
    assert titles["length"] == ["Spearman +0.81: the score follows length"]
    assert [title.split("\n")[0] for title in titles["histograms"]] == [
        "what decided", "perplexity", "mean entropy (nats)", "target tokens",
    ]  # fmt: skip


def test_every_row_is_in_the_histograms():
    figures = selection_figures(SelectionRecord(facts(), audit(value=[1e-3] * 39 + [1e9]), []))
    for axis in figures["histograms"].axes:
        assert sum(patch.get_height() for patch in axis.patches) == 40


def test_parts_without_data_are_left_out():
    bare = {"decision": ["keep", "drop"], "value": [float("nan"), None], "n_target": [3, 4]}
    record = SelectionRecord(facts(composition={}, score_length_spearman=None), bare, [])
    assert list(selection_figures(record)) == ["histograms"]
    assert "There is none." in selection_html(record)


@pytest.mark.parametrize(
    "changes",
    [
        {"ppl": [2.0] * 40},
        {"ppl": [float("nan")] * 39 + [3.0]},
        {"ppl": [4.85e8, *[1.0] * 39], "entropy": [0.0] * 40},
        {"decision": ["keep"] * 40},
        {"n_target": [0] * 40},
    ],
)
def test_odd_statistics_still_draw(changes):
    assert selection_html(SelectionRecord(facts(), audit(**changes), []))


def test_unknown_scoring_time_is_said():
    cost = {"scoring_seconds": None, "relative_flops": {"LoRA, 1 epoch": 0.75}, "seconds_saved_per_lora_epoch": None}
    assert "how long it took is not known" in selection_html(SelectionRecord(facts(cost=cost), audit(), []))
