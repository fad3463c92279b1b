"""`prunetune merge` and `prunetune delta info` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunetune.cli.main import app
from tests.export.test_stream_merge import adapter, saved
from tests.support import tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    saved(tiny_model(tie_word_embeddings=False), tmp_path / "base")
    for name in ("a", "b"):
        adapter(tmp_path / "base", tmp_path / name, seed=ord(name))
    rows = "".join(json.dumps({"text": f"w{i} w{i + 1} w5 w9 w2"}) + "\n" for i in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    return tmp_path


def typed(*words: str):
    return CliRunner().invoke(app, list(words))


def test_merge_with_options_and_weights(place: Path) -> None:
    done = typed("merge", "a", "b", "--base", "base", "--how", "dare_ties", "--weights", ".7,.3", "--out", "out")
    assert done.exit_code == 0, done.output
    facts = json.loads((place / "out/prunetune_merge.json").read_text())
    assert [model["weight"] for model in facts["models"]] == [0.7, 0.3]
    words = ("--delta", "della", "--drop", "60%", "--set", "epsilon=0.1", "--scale", "0.5", "--dtype", "bfloat16")
    done = typed("merge", "a", "--base", "base", *words, "--out", "one")
    assert done.exit_code == 0, done.output
    facts = json.loads((place / "one/prunetune_merge.json").read_text())
    assert facts["delta"]["method"] == "della"
    assert facts["scale"] == 0.5
    assert json.loads((place / "one/config.json").read_text())["dtype"] == "bfloat16"


def test_options_reach_the_merge(place: Path) -> None:
    words = (
        "--delta",
        "dare",
        "--drop",
        "90%",
        "--rescale",
        "auto",
        "--calibration",
        "rows.jsonl",
        "--judge",
        "outputs",
    )
    done = typed("merge", "a", "--base", "base", *words, "--for", "q_proj: drop=50%", "--allow-large", "--out", "out")
    assert done.exit_code == 0, done.output
    facts = json.loads((place / "out/prunetune_merge.json").read_text())
    assert facts["delta"]["method"] == "darex_q"
    assert facts["delta"]["multiplier"] >= 0
    assert facts["rules"][0]["options"] == {"drop": "50%"}
    done = typed("merge", "a", "b", "--base", "base", "--output", "adapter", "--out", "joined")
    assert done.exit_code == 0, done.output
    assert json.loads((place / "joined/adapter_config.json").read_text())["r"] == 8


def test_info_shows_every_kind_of_matrix(place: Path) -> None:
    done = typed("delta", "info", "a", "--base", "base", "--calibration", "rows.jsonl")
    assert done.exit_code == 0, done.output
    for word in ("down_proj", "q_proj", "99%"):
        assert word in done.output
    assert "name a file of rows" in typed("delta", "info", "a", "b", "--base", "base").output
    each = typed("delta", "info", "a", "--base", "base", "--calibration", "rows.jsonl", "--each").output
    assert "0.mlp.up_proj" in each
    assert "…" not in each, "numbers are whole in 80 columns"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--weights", "x"), "list of numbers"),
        (("--set", "epsilon"), "KEY=VALUE"),
        (("--drop", "150%", "--delta", "dare"), "less than or equal to 1"),
        (("--drop", "1.5", "--delta", "dare"), "write 1.5%"),
        (("--drop", "-1", "--delta", "dare"), "greater than or equal to 0"),
        (("--delta", "dare", "--set", "dorp=1"), "drop"),
        (("--dtype", "int8"), "float32"),
        (("--how", "tise"), "ties"),
        (("--shard-size", "200"), "180MB"),
        (("--judge", "los"), "loss or outputs"),
        (("--output", "lora"), "model or adapter"),
        (("--for", "mlp"), "REGEX: KEY=VALUE"),
        (("--rescale", "atuo", "--delta", "dare"), "auto"),
    ],
)
def test_what_cannot_work_is_said(words: tuple[str, ...], said: str, place: Path) -> None:
    done = typed("merge", "a", "--base", "base", "--out", "out", *words)
    assert done.exit_code == 2
    assert said in done.output
    assert not (place / "out").exists()
