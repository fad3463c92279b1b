"""`prunetune prune` as it is typed, and its lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunetune.cli.main import app
from prunetune.methods.allocation import ALLOCATIONS
from prunetune.methods.scores import SCORES
from tests.support import tiny_folder, tiny_rows, write_rows

NUMBERS = ("--tokens", "--judge-tokens", "--max-length", "--seed")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", tiny_rows(30))
    return tmp_path


def typed(*words: str):
    return CliRunner().invoke(app, list(words))


def prune(*words: str):
    return typed("prune", "base", "--out", "out", "--align", "8", "--tokens", "150", "--no-verify", *words)


def test_the_command_of_the_readme(place: Path) -> None:
    words = ("--score", "wanda", "--allocation", "dynamic_program", "--compensation", "refit", "--target", "70%")
    done = prune(*words, "--calibration", "rows.jsonl", "--set", "compensation.ridge=0.2", "--set", "allocation.grid=3")
    assert done.exit_code == 0, done.output
    origin = json.loads((place / "out/plan.json").read_text())["origin"]
    assert origin["allocation"] == "dynamic_program"
    assert origin["options"]["compensation"] == {"ridge": "0.2"}
    assert 0.55 < origin["decoder_kept"] <= 0.70


@pytest.mark.parametrize(("target", "field"), [("50K", "params"), ("100KB", "size"), ("0.7", "kept")])
def test_budgets_in_three_forms(target: str, field: str, place: Path) -> None:
    done = prune("--score", "magnitude", "--compensation", "none", "--target", target, "--units", "mlp_channels")
    assert done.exit_code == 0, done.output
    facts = json.loads((place / "out/prunetune.json").read_text())
    limit = {"params": facts["parameters"] <= 50_000, "size": facts["weights_bytes"] <= 100_000, "kept": True}
    assert limit[field]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "70%"), "name a file of rows"),
        (("--target", "170%"), "--target: 170% is no budget; write for example 70%"),
        (("--target", "abc"), "--target: abc is no budget; write for example 70%"),
        (("--target", "70%", "--align", "0"), "--align: Input should be greater than or equal to 1 (set: 0)"),
        (("--target", "70%", "--shard-size", "foo"), "--shard-size: 'foo' is not a size; write for example 180MB"),
        (("--target", "70%", "--out", "base"), "--out: base exists; name another folder, or add --overwrite"),
        *((("--target", "70%", name, "-1"), f"{name}: -1 is too small; set at least") for name in NUMBERS),
        (("--target", "70%", "--units", "channels"), "mlp_channels"),
        (("--target", "70%", "--set", "ridge=1"), "SECTION.KEY=VALUE"),
        (("--target", "70%", "--score", "cfsp", "--units", "kv_groups", "--calibration", "rows.jsonl"), "cfsp ranks"),
        (("--target", "70%", "--dtype", "int8"), "--dtype: int8 is not float32 or bfloat16 or float16"),
    ],
)
def test_what_cannot_work_is_said(words: tuple[str, ...], said: str, place: Path) -> None:
    done = prune(*words)
    assert done.exit_code == 2
    assert said in done.output
    assert not (place / "out").exists()


@pytest.mark.parametrize(("subject", "registry"), [("scores", SCORES), ("allocation", ALLOCATIONS)])
def test_lists_show_every_method(subject: str, registry) -> None:
    done = typed("list", subject)
    assert done.exit_code == 0, done.output
    shown = "".join(done.output.split())  # cells are folded at spaces
    for name, kind in registry.items():
        assert name in shown
        assert kind.paper.split(",")[0].replace(" ", "") in shown
