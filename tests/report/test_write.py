"""The model card and report.html: content, self-containment, missing parts."""

from __future__ import annotations

import base64
import json
import re

import pytest
import yaml

from prunetune.core.errors import PlanMismatchError
from prunetune.report.card import front_matter, licence_note
from prunetune.report.gather import gather
from prunetune.report.story import loading_code, papers, plan_rows, summary
from prunetune.report.write import write_reports


def test_all_reports_are_written_and_the_card_goes_with_the_model(run_folder, facts):
    write_reports(run_folder, facts)
    assert len(list((run_folder / "figures").glob("*.png"))) == 3
    card = (run_folder / "README.md").read_text()
    assert card == (run_folder / "compact" / "README.md").read_text()
    assert (run_folder / "report.html").exists()


def test_summary_says_what_was_measured(run_folder, facts):
    assert summary(gather(run_folder, facts)) == (
        "owner/small-model keeps 68.3% of its parameters (134.5M to 91.9M; 59.8% of the decoder). "
        "Perplexity on held-out rows of the domain improves from 11.50 to 9.16 (dense LoRA, not pruned: 5.75). "
        "On general text it goes from 39.0 to 153.0. "
        "It reads prompts at 1.42x and writes text at 1.42x the base model's speed."
    )


def test_card_has_front_matter_table_config_and_links(run_folder, facts):
    write_reports(run_folder, facts)
    _, head, body = (run_folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/small-model",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "tags": ["prunetune", "pruned", "lora", "text-generation"],
    }
    assert "| Domain perplexity ↓ | 11.50 | 5.75 | 9.16 | -20.3% |" in body
    assert "```yaml\ntarget:\n  kept: 0.6\nseed: 7\n```" in body
    assert "[arXiv:2310.06694](https://arxiv.org/abs/2310.06694)" in body
    assert "[A paper](https://example.org/p)" in body
    assert "| MLP channels in a layer | 80 | 48 |" in body
    assert "which is under Apache-2.0" in body
    assert "CC BY 4.0" in body
    assert "torch 2.13.0" in body
    assert "Training time: 1 min 15 s" in body
    assert "\n\n\n" not in body


def test_python_in_the_card_compiles(run_folder, facts):
    for conversational in (False, True):
        compile(loading_code("path", conversational), "card", "exec")


def test_html_is_one_file_that_fetches_nothing(run_folder, facts):
    write_reports(run_folder, facts)
    page = (run_folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 3
    for source, name in zip(sources, ("training", "kept_units", "scores")):
        assert source.startswith("data:image/png;base64,")
        embedded = base64.b64decode(source.split(",", 1)[1])
        assert embedded == (run_folder / "figures" / f"{name}.png").read_bytes()
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert "Prose &lt;about&gt; the domain &amp; more." in page
    assert "1.42x (1.37–1.47)" in page


def test_empty_folder_and_no_facts_still_make_reports(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_reports(folder)
    card = (folder / "README.md").read_text()
    assert "The model, fine-tuned in one run." in card
    assert "nothing was pruned" in card
    assert "licence is not known here" in card
    assert "Before and after" not in card + (folder / "report.html").read_text()
    assert not (folder / "compact").exists()


def test_worse_is_called_worse(run_folder, facts):
    record = gather(run_folder, facts)
    record.results[-1].numbers["domain_ppl"] = 20.0
    assert "worsens from 11.50 to 20.00" in summary(record)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"base_licence": "MIT"}, {"license": "mit"}),
        ({"base_licence": "My own terms"}, {"license": "other", "license_name": "my-own-terms"}),
        ({"base_model": "/data/models/x"}, {}),
        ({"base_model": "smollm2-135m"}, {}),
    ],
)
def test_front_matter_never_names_a_path_or_an_unknown_licence(facts, expected, tmp_path):
    found = front_matter(gather(tmp_path, facts))
    fixed = {"library_name", "pipeline_tag", "tags"}
    assert {key: value for key, value in found.items() if key not in fixed} == expected


def test_unknown_licences_are_said_to_be_unknown(tmp_path):
    note = licence_note(gather(tmp_path, {}))
    assert "not known here" in note
    assert "must check" in note


def test_papers_are_found_in_texts_once(tmp_path):
    record = gather(tmp_path, {"papers": ["arXiv 1801.05787", "see 1801.05787 and 2310.06694", "A book"]})
    assert papers(record) == [
        ("arXiv:1801.05787", "https://arxiv.org/abs/1801.05787"),
        ("arXiv:2310.06694", "https://arxiv.org/abs/2310.06694"),
        ("A book", ""),
    ]


def test_plan_rows_leave_out_what_stayed_whole(plan):
    assert plan_rows(plan) == [("MLP channels in a layer", "80", "48"), ("KV groups in a layer", "4", "3")]


def test_a_damaged_plan_is_an_error_not_a_report(run_folder):
    (run_folder / "plan.json").write_text("{}")
    with pytest.raises(PlanMismatchError):
        write_reports(run_folder)
    assert not (run_folder / "report.html").exists()


def test_what_online_selection_came_to_is_told(run_folder, facts):
    steps = [
        {
            "step": step,
            "rows": [1, 3],
            "target_tokens": [5, 20],
            "forward_tokens": [10, 40],
            "scored": 3,
            "threshold": None,
            "kept": [["a", "topup", 1.0]],
            "dropped": [["b", "Q1", 2.0], [f"c{step}", "Q3", None]],
        }
        for step in (1, 2)
    ]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    (run_folder / "selection.jsonl").write_text(lines + '{"step": 3, "ro')
    write_reports(run_folder, facts | {"samples": "q_tuning"})
    page = (run_folder / "report.html").read_text()
    assert "2 of 6 (33.3%)" in page
    assert "10 of 40 (25.0%)" in page
    # Of a, b, c1 and c2 only a was ever trained on.
    assert "<td>Rows that no step trained on</td><td>75.0%</td>" in page
    assert "those hold too few rows" in page
    assert "33.3% of the rows" in (run_folder / "README.md").read_text()
