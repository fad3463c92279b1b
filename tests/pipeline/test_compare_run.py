"""`prunetune compare` on a tiny model: cells, results, resumption, reports."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune.config.comparison import Cell, load_comparison
from prunetune.core.errors import ConfigError, DataError, FolderInUseError
from prunetune.core.lock import only_one
from prunetune.pipeline import compare_cell, compare_run
from prunetune.pipeline.compare_cell import run_cell
from prunetune.pipeline.compare_folder import BEGUN, fingerprint
from prunetune.pipeline.compare_request import one_shot_request
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
    assert len({fingerprint(cell) for cell in cells}) == len(cells)


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


def test_a_stopped_cell_uses_what_it_has_pruned(comparison_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compare_cell, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare_run.compare_recipes(comparison_file, [MAGNITUDE, "compare.seeds=[0]"], only=MAGNITUDE_ID)
    monkeypatch.setattr(compare_cell, "prune_once", stopped)
    [result] = compare_run.compare_recipes(comparison_file, [MAGNITUDE, "compare.seeds=[0]"], only=MAGNITUDE_ID)
    assert 0.5 < result["kept_decoder"] <= 0.6


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
    with pytest.raises(ConfigError, match=message) as raised:
        compare_run.read_comparison(comparison_file, [change])
    assert len(raised.value.problems) == 1


def test_a_run_without_the_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: smollm2-135m\ntarget: 60%\n")
    with pytest.raises(ConfigError, match="has no section `compare`"):
        compare_run.read_comparison(path, [])


MAGNITUDE = "compare.recipes=[{one_shot: magnitude, compensation: none}]"
MAGNITUDE_ID = "one_shot-magnitude-uniform-none-0.6-s0"


def stub_result(cell: Cell) -> dict[str, Any]:
    """As ``run_cell`` returns it, without running anything."""
    numbers = {"domain_ppl": 5.0 + len(cell.label), "general_ppl": 9.0, "seconds": 1.0, "steps": 3, "peak_bytes": 10}
    facts = {"id": cell.id, "label": cell.label, "kind": cell.kind, "kept": cell.kept, "seed": cell.seed}
    return {**facts, **numbers, "kept_decoder": 0.6, "fingerprint": fingerprint(cell)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells are run here and at once; the ids of those that were."""
    ran: list[str] = []

    def here(path: Path, overrides: list[str], only: str) -> bool:
        try:
            compare_run.compare_recipes(path, overrides, only=only)
        except RuntimeError:
            return False
        return True

    def run(cell: Cell) -> dict[str, Any]:
        ran.append(cell.id)
        return stub_result(cell)

    monkeypatch.setattr(compare_run, "_run_apart", here)
    monkeypatch.setattr(compare_cell, "run_cell", run)
    return ran


def only_cell(path: Path, *changes: str) -> Cell:
    return compare_run.read_comparison(path, [MAGNITUDE, "compare.seeds=[0]", *changes]).cells[0]


def test_an_unfinished_cell_of_other_settings_is_thrown_away(
    comparison_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    quick = "export.verify=false"
    with monkeypatch.context() as patch:
        patch.setattr(compare_cell, "train", fails)
        with pytest.raises(RuntimeError):
            run_cell(only_cell(comparison_file, quick))
    # A base that was pruned to 60% waits there; and then checkpoints that another learning rate made.
    changes = [quick, "target.units=[mlp_channels]", "target.align=16", "train.save_every=1"]
    assert run_cell(only_cell(comparison_file, *changes))["domain_ppl"] > 1
    again = run_cell(only_cell(comparison_file, *changes, "train.learning_rate=0.05"))
    assert "thrown away" in " ".join(capsys.readouterr().out.split())
    other = f"folder={comparison_file.parent / 'fresh'}"
    fresh = run_cell(only_cell(comparison_file, *changes, "train.learning_rate=0.05", other))
    assert [again[name] for name in ("kept_decoder", "domain_ppl")] == [
        fresh[name] for name in ("kept_decoder", "domain_ppl")
    ]


def test_the_fingerprint_knows_rows_and_base_and_options(comparison_file: Path) -> None:
    folder = comparison_file.parent
    before = fingerprint(only_cell(comparison_file))
    assert fingerprint(only_cell(comparison_file)) == before
    rows = (folder / "train.jsonl").read_text()
    write_rows(folder / "train.jsonl", tiny_rows(10))
    assert fingerprint(only_cell(comparison_file)) != before
    (folder / "train.jsonl").write_text(rows)
    assert fingerprint(only_cell(comparison_file)) == before
    config = (folder / "model/config.json").read_text()
    (folder / "model/config.json").write_text(config.replace("{", '{"rms_norm_eps": 0.5, ', 1))
    assert fingerprint(only_cell(comparison_file)) != before
    (folder / "model/config.json").write_text(config)
    tiny_folder(folder / "model", seed=5)
    assert fingerprint(only_cell(comparison_file)) != before
    taylor = [
        only_cell(comparison_file, f"compare.recipes=[{{one_shot: taylor, set: {{score.order: {order}}}}}]")
        for order in ("first", "second")
    ]
    assert len({cell.id for cell in taylor}) == len({fingerprint(cell) for cell in taylor}) == 2
    assert taylor[0].label == "one-shot taylor, uniform, refit, score.order=first"


def test_changed_rows_are_not_taken_for_the_results_own(comparison_file: Path, quick: list[str]) -> None:
    compare_run.compare_recipes(comparison_file, [MAGNITUDE])
    write_rows(comparison_file.parent / "train.jsonl", tiny_rows(10))
    with pytest.raises(ConfigError, match="other rows"):
        compare_run.compare_recipes(comparison_file, [MAGNITUDE])
    assert len(quick) == 2


def test_only_one_process_runs_a_comparison_but_all_may_read_it(comparison_file: Path, quick: list[str]) -> None:
    out = comparison_file.parent / "out"
    with only_one(out), pytest.raises(FolderInUseError, match=str(out)):
        compare_run.compare_recipes(comparison_file, [MAGNITUDE])
    assert quick == []
    with only_one(out / "cells" / MAGNITUDE_ID), pytest.raises(FolderInUseError, match=MAGNITUDE_ID):
        compare_run.compare_recipes(comparison_file, [MAGNITUDE], only=MAGNITUDE_ID)
    done = compare_run.compare_recipes(comparison_file, [MAGNITUDE])
    with only_one(out):
        assert compare_run.compare_recipes(comparison_file, [MAGNITUDE]) == done
        assert compare_run.read_comparison(comparison_file, [MAGNITUDE]).cells
    # One that is finished is not run again.
    compare_run.compare_recipes(comparison_file, [MAGNITUDE], only=MAGNITUDE_ID)
    assert len(quick) == 2


def test_what_a_kill_left_of_a_finished_cell_is_dropped(comparison_file: Path, quick: list[str]) -> None:
    compare_run.compare_recipes(comparison_file, [MAGNITUDE])
    cell = comparison_file.parent / "out/cells" / MAGNITUDE_ID
    for name in ("train", "pruned"):
        (cell / name).mkdir(parents=True)
    (cell / BEGUN).write_text("{}")
    compare_run.compare_recipes(comparison_file, [MAGNITUDE])
    assert sorted(path.name for path in cell.iterdir()) == [BEGUN]


def test_failed_runs_are_in_the_report_and_the_command_can_be_pasted(
    comparison_file: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cell: Cell) -> dict[str, Any]:
        if cell.label.startswith("joint random"):
            raise RuntimeError("out of memory")
        return {**stub_result(cell), "domain_ppl": math.nan if cell.kind == "one_shot" else 5.0}

    monkeypatch.setattr(compare_cell, "run_cell", run)
    overrides = ["compare.kept=[0.6, 0.8]"]
    with pytest.raises(DataError) as raised:
        compare_run.compare_recipes(comparison_file, overrides)
    again = str(raised.value).partition("again: ")[2]
    assert shlex.split(again) == ["prunetune", "compare", str(comparison_file), *overrides]
    table = (comparison_file.parent / "out/table.md").read_text()
    assert table.count("joint random, none (no result: failed, or still to be done)") == 2
    assert "| diverged |" in table


def test_compensations_are_compared_with_the_same_calibration(comparison_file: Path) -> None:
    recipes = "compare.recipes=[{one_shot: wanda, compensation: [none, refit, mask_tuning]}]"
    comparison_file.write_text(comparison_file.read_text() + "compensation: {method: refit, tokens: 512}\n")
    cells = compare_run.read_comparison(comparison_file, [recipes, "compare.seeds=[0]"]).cells
    requests = [one_shot_request(cell, "model", ()) for cell in cells]
    assert [request.compensation for request in requests] == ["none", "refit", "mask_tuning"]
    assert [request.tokens for request in requests] == [512, 512, 512]
    assert all("tokens" not in request.options["compensation"] for request in requests)


def test_options_of_a_recipe_reach_its_methods(comparison_file: Path) -> None:
    recipe = "{one_shot: taylor, allocation: softmax, set: {score.order: first, allocation.temperature: 0.5}}"
    [cell] = compare_run.read_comparison(comparison_file, [f"compare.recipes=[{recipe}]", "compare.seeds=[0]"]).cells
    options = one_shot_request(cell, "model", ()).options
    assert (options["score"], options["allocation"]) == ({"order": "first"}, {"temperature": 0.5})


def test_a_score_takes_the_units_that_it_ranks_unless_they_are_set(comparison_file: Path) -> None:
    recipes = "compare.recipes=[{one_shot: [block_influence, peak_to_peak]}]"
    cells = compare_run.read_comparison(comparison_file, [recipes, "compare.seeds=[0]"]).cells
    units = [one_shot_request(cell, "model", ()).target.units for cell in cells]
    assert units == [("layers",), ("mlp_channels",)]


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("{one_shot: taylor, set: {score.oder: first}}", [], "did you mean 'order'"),
        ("{one_shot: taylor, set: {score.order: third}}", [], "score.order"),
        ("{one_shot: wanda, set: {allocation.temperature: 1}}", [], "'uniform' has no such option"),
        ("{one_shot: wonda}", [], "did you mean 'wanda'"),
        ("{one_shot: wanda, allocation: unifrom}", [], "did you mean 'uniform'"),
        ("{joint: saliency, compensation: bias}", [], "only `prunetune prune` can"),
        ("{one_shot: cfsp}", ["target.units=[kv_groups]"], "cfsp ranks mlp_channels, not kv_groups"),
        ("{one_shot: wanda}", ["target.units=[hidden]"], "not hidden"),
        ("{one_shot: wanda, set: {target.units: [layers, mlp_channels]}}", [], "take layers alone"),
        ("{joint: apt, compensation: none}", ["target.units=[hidden]"], "apt cannot rank hidden"),
        ("{joint: saliency, allocation: foo}", [], "joint has no `allocation`"),
    ],
)
def test_what_would_fail_in_a_cell_is_refused_when_the_file_is_read(
    comparison_file: Path, recipe: str, changes: list[str], message: str
) -> None:
    changes = [*changes, *(["target.align=64"] if changes == ["target.units=[kv_groups]"] else [])]
    with pytest.raises(ConfigError, match=message):
        compare_run.read_comparison(comparison_file, [f"compare.recipes=[{recipe}]", *changes])
