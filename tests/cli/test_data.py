"""`prunetune data`: what is printed and written, what is refused, and that most of it needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prunetune.data.store import write_scores
from tests.cli.test_main import in_fresh_process, invoke
from tests.data.selections import stored, tokenizer_folder
from tests.support import tiny_folder, tiny_rows, write_rows


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    write_scores(tmp_path / "scores", stored(tokenizer=tokenizer_folder(tmp_path / "tokenizer")))
    return tmp_path / "scores"


@pytest.fixture
def kept(scores: Path, tmp_path: Path) -> Path:
    result = invoke("data", "select", scores, "--method", "q_tuning", "--samples", "50%", "--tokens", "60%",
                    "--out", tmp_path / "kept", width=200)  # fmt: skip
    assert result.exit_code == 0, result.output
    return tmp_path / "kept"


def facts(folder: Path):
    return json.loads((folder / "selection.json").read_text())


def row_with(folder: Path, decision: str) -> str:
    audit = pq.read_table(folder / "audit.parquet").to_pydict()
    return audit["id"][audit["decision"].index(decision)]


def test_help_lists_every_command():
    result = invoke("data", "--help")
    assert result.exit_code == 0
    for command in ("inspect", "score", "select", "explain", "diff", "report"):
        assert f" {command} " in result.output
        assert invoke("data", command, "--help").exit_code == 0


def test_select_takes_q_tunings_own_tokens_and_says_so(scores, tmp_path):
    result = invoke("data", "select", scores, "--method", "q_tuning", "--samples", "50%", "--tokens", "60%",
                    "--out", tmp_path / "kept", width=200)  # fmt: skip
    assert result.exit_code == 0
    assert "--token-method neighbour_perplexity: Q-Tuning's own" in result.output
    assert "12" in result.output
    assert "50.0%" in result.output
    settings = facts(tmp_path / "kept")["settings"]
    assert (settings["samples_method"], settings["tokens_method"]) == ("q_tuning", "neighbour_perplexity")
    assert (tmp_path / "kept" / "report.html").is_file()


def test_select_hands_every_option_on(scores, tmp_path):
    result = invoke(
        "data", "select", scores, "--out", tmp_path / "kept", "--method", "perplexity", "--samples", "0.5",
        "--set", "lower=0.1", "--token-method", "loss", "--tokens", "80%", "--token-set", "band=high",
        "--scope", "all", "--floor", "20%", "--stratify", "source", "--minimum", "2", "--seed", "7", width=200,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert facts(tmp_path / "kept")["settings"] == {
        "samples_method": "perplexity", "samples_kept": 0.5, "samples_options": {"lower": 0.1},
        "tokens_method": "loss", "tokens_kept": 0.8, "tokens_options": {"band": "high"},
        "scope": "all", "floor": 0.2, "stratify": "source", "minimum": 2, "seed": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--method", "q_tunning"], 2, "did you mean 'q_tuning'?"),
        (["--method", "random", "--samples", "25"], 2, "--samples: '25' is not a fraction"),
        (["--tokens", "70%"], 2, "name a token method"),
        (["--token-method", "loss", "--tokens", "70%", "--token-set", "bands=low"], 2, "did you mean 'band'?"),
        (["--method", "perplexity", "--set", "lower"], 2, "is not KEY=VALUE"),
        (["--method", "random", "--stratify", "sauce"], 2, "did you mean 'source'?"),
        (["--token-method", "excess_loss", "--tokens", "70%"], 1, "reference_nll"),
    ],
)
def test_select_refuses_what_cannot_work(scores, tmp_path, arguments, code, said):
    result = invoke("data", "select", scores, "--out", tmp_path / "kept", *arguments, width=200)
    assert result.exit_code == code
    assert said in result.output
    assert not (tmp_path / "kept").exists()


def test_select_leaves_a_former_selection_alone_unless_told(scores, kept):
    arguments = ["data", "select", scores, "--out", kept, "--method", "random", "--samples", "50%"]
    result = invoke(*arguments, width=200)
    assert result.exit_code == 1
    assert "add --overwrite" in result.output
    assert invoke(*arguments, "--overwrite").exit_code == 0
    assert facts(kept)["settings"]["samples_method"] == "random"


def test_select_wants_scores(tmp_path):
    result = invoke("data", "select", tmp_path, "--out", tmp_path / "kept", width=200)
    assert result.exit_code == 1
    assert "Make them with `prunetune data score`" in result.output


@pytest.mark.parametrize("decision", ["keep", "mask", "drop"])
def test_explain_says_why(kept, decision):
    result = invoke("data", "explain", kept, "--id", row_with(kept, decision)[:7], width=200)
    assert result.exit_code == 0, result.output
    assert ("dropped: " if decision == "drop" else "kept: ") in result.output
    assert "ppl" in result.output
    assert "</s>" in result.output
    text = result.output.splitlines()[-2]
    # Not a terminal: brackets instead of styles.
    assert ("[[" in text, "~~" in text) == (decision != "drop", decision != "keep")
    assert "no row of" in invoke("data", "explain", kept, "--id", "zzz", width=200).output


def test_diff_and_report(scores, kept, tmp_path):
    other = tmp_path / "other"
    assert invoke("data", "select", scores, "--out", other, "--method", "random", "--samples", "50%").exit_code == 0
    result = invoke("data", "diff", kept, other, "--rows", "1", width=200)
    assert result.exit_code == 0
    assert "overlap of what stays" in result.output
    assert "more; --rows shows more" in result.output
    (kept / "report.html").unlink()
    assert invoke("data", "report", kept).exit_code == 0
    assert (kept / "report.html").is_file()


def test_diff_of_other_rows_is_refused(kept, tmp_path):
    write_scores(tmp_path / "others", stored(seed=5))
    assert invoke("data", "select", tmp_path / "others", "--out", tmp_path / "b").exit_code == 0
    result = invoke("data", "diff", kept, tmp_path / "b", width=200)
    assert result.exit_code == 1
    assert "selections of different rows" in result.output


def test_none_of_this_imports_torch(scores, kept, tmp_path):
    name = row_with(kept, "mask")
    commands = [
        ["data", "select", str(scores), "--method", "near_duplicates", "--out", str(tmp_path / "b")],
        ["data", "select", str(scores), "--method", "q_tuning", "--samples", "50%", "--tokens", "60%",
         "--stratify", "source", "--out", str(tmp_path / "c")],
        ["data", "explain", str(kept), "--id", name],
        ["data", "diff", str(kept), str(tmp_path / "c")],
        ["data", "report", str(kept)],
    ]  # fmt: skip
    out = in_fresh_process(
        "import sys\nfrom prunetune.cli.main import app\n"
        f"for command in {commands!r}:\n    app(command, standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'trl') if name in sys.modules])"
    )
    assert out.splitlines()[-1] == "[]"


def test_from_rows_to_a_selection(tmp_path):
    """Inspect, score, select and explain with a real, tiny model."""
    model = tiny_folder(tmp_path / "model", "llama", chat=True)
    rows = write_rows(tmp_path / "rows.jsonl", [*tiny_rows(12), {"prompt": "w1", "completion": ""}])
    result = invoke("data", "inspect", rows, "--model", model, width=200)
    assert result.exit_code == 0, result.output
    assert "13 rows" in result.output
    assert "line 13: completion is empty" in result.output
    assert "[[what the loss sees]]" in result.output
    assert "</s>]]" in result.output.replace(" ]]", "]]")
    write_rows(rows, tiny_rows(12))
    result = invoke("data", "score", rows, "--model", model, "--out", tmp_path / "scores", "--with", "ifd", width=200)
    assert result.exit_code == 0, result.output
    assert "12 rows scored" in result.output
    assert "direct_nll" in result.output
    result = invoke("data", "select", tmp_path / "scores", "--method", "q_tuning", "--samples", "50%", "--tokens",
                    "50%", "--out", tmp_path / "kept", width=200)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert facts(tmp_path / "kept")["counts"]["kept_rows"] == 6
    result = invoke("data", "explain", tmp_path / "kept", "--id", row_with(tmp_path / "kept", "drop"), width=200)
    assert "<assistant>" in result.output
    result = invoke("data", "score", rows, "--model", model, "--out", tmp_path / "new", "--with", "idf", width=200)
    assert result.exit_code == 2
    assert "did you mean 'ifd'?" in result.output
