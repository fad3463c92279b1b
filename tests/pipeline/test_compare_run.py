"""`prunetune compare` on a tiny model: cells, results, resumption, reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prunetune.config.comparison import load_comparison
from prunetune.core.errors import ConfigError
from prunetune.pipeline import compare_run
from prunetune.pipeline.compare_cell import run_cell
from tests.support import tiny_folder, tiny_rows, write_rows


@pytest.fixture
def comparison_file(tmp_path: Path) -> Path:
    values = {
        "model": {"name": str(tiny_folder(tmp_path / "model"))},
        "data": {
            "train": str(write_rows(tmp_path / "train.jsonl", tiny_rows(30))),
            "validation": str(write_rows(tmp_path / "validation.jsonl", tiny_rows(8, seed=1))),
        },
        "target": {"align": 8},
        "train": {"max_steps": 3, "batch_size": 2, "max_length": 32, "bf16": False},
        "evaluate": {"answer": r"w(\d+)\W*$", "answer_rows": 4, "answer_tokens": 4},
        "folder": str(tmp_path / "out"),
        "compare": {
            "kept": [0.6],
            "seeds": [0, 1],
            "recipes": ["dense", {"joint": ["saliency", "random"], "compensation": "none"}, {"one_shot": "magnitude"}],
        },
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_combination_is_one_cell_and_references_have_no_budget(comparison_file: Path) -> None:
    cells = load_comparison(comparison_file, ["compare.kept=[0.6,0.8]"]).cells
    assert [cell.id for cell in cells if cell.kind == "dense"] == ["dense-s0", "dense-s1"]
    joint = [cell for cell in cells if cell.kind == "joint"]
    assert len(joint) == 2 * 2 * 2 == len({cell.id for cell in joint})
    assert {(cell.config.mask.method, cell.config.target.kept, cell.config.seed) for cell in joint} == {
        (mask, kept, seed) for mask in ("saliency", "random") for kept in (0.6, 0.8) for seed in (0, 1)
    }
    assert len({cell.fingerprint() for cell in cells}) == len(cells)


def test_runs_of_a_comparison_leave_results_and_reports_and_are_not_run_twice(
    comparison_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def here(path: Path, overrides: list[str], only: str) -> bool:
        # The same as the child process does, without starting Python eight times.
        ran.append(only)
        compare_run.compare_recipes(path, overrides, only=only)
        return True

    monkeypatch.setattr(compare_run, "_run_apart", here)
    results = compare_run.compare_recipes(comparison_file)
    assert len(ran) == len(results) == 8
    by_id = {result["id"]: result for result in results}
    assert by_id["dense-s0"]["kept_decoder"] == 1.0
    pruned = by_id["joint-saliency-none-0.6-s0"]
    assert 0.5 < pruned["kept_decoder"] <= 0.6
    assert pruned["steps"] == 3
    one_shot = by_id["one_shot-magnitude-uniform-refit-0.6-s0"]
    assert one_shot["kept_decoder"] == pruned["kept_decoder"]
    assert pruned["params_total"] < by_id["dense-s0"]["params_total"]
    assert all(0 <= result["exact_match"] <= 1 and result["domain_ppl"] > 1 for result in results)
    folder = comparison_file.parent / "out"
    assert json.loads((folder / "results.json").read_text()) == results
    assert "joint saliency, none" in (folder / "table.md").read_text()
    assert "joint random, none" in (folder / "report.html").read_text()
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert not (folder / "cells" / "dense-s0" / "train").exists()

    (folder / "results" / "dense-s1.json").unlink()
    assert compare_run.compare_recipes(comparison_file)[1]["domain_ppl"] == by_id["dense-s1"]["domain_ppl"]
    assert len(ran) == 9
    with pytest.raises(ConfigError, match="other settings"):
        compare_run.compare_recipes(comparison_file, ["train.learning_rate=0.5"])


def test_a_stopped_cell_goes_on_from_its_checkpoint(comparison_file: Path) -> None:
    cell = load_comparison(comparison_file, ["train.save_every=1"]).cells[2]
    whole = run_cell(cell)
    assert whole["seconds"] > 0
    # The seconds too: those of the first time count although no step is taken again.
    assert run_cell(cell) | {"peak_bytes": 0} == whole | {"peak_bytes": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("compare.recipes=[saliency]", "write `joint: saliency`"),
        ("compare.recipes=[{joint: saliency, one_shot: wanda}]", "a recipe is base, dense"),
        ("compare.recipes=[{joint: salience}]", "did you mean"),
        ("compare.recipes=[]", "at least 1 item"),
        ("compare.seed=[1]", "seed"),
    ],
)
def test_faulty_sections_are_refused(comparison_file: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_run.read_comparison(comparison_file, [change])


def test_a_run_without_the_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: smollm2-135m\ntarget: 60%\n")
    with pytest.raises(ConfigError, match="has no section `compare`"):
        compare_run.read_comparison(path, [])
