"""Every shipped YAML trains three steps (one a phase), on a tiny model and tiny data in place of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunetune.config.load import load_config
from prunetune.pipeline.compare_run import read_comparison
from prunetune.pipeline.run import run
from tests.support import tiny_folder, tiny_rows, write_rows

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/presets/*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configuration_trains_a_step_of_each_phase(path: Path, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", tiny_rows(40))
    config = load_config(
        path,
        [
            f"model.name={model}",
            "model.dtype=float32",
            f"data.train={data}",
            "data.validation=null",
            "target.kept=60%",
            "target.align=8",
            "train.max_steps=3",
            "train.batch_size=2",
            "train.max_length=32",
            "train.bf16=false",
            "evaluate.enabled=false",
            "evaluate.compare=base",
            "export.verify=false",
            f"folder={tmp_path / 'run'}",
            "export.folder=null",
        ],
    )
    report = run(config)
    assert report.exported is not None
    assert (report.exported.folder / "model.safetensors").exists()
    assert (tmp_path / "run" / "plan.json").exists()


def test_there_are_shipped_configurations() -> None:
    assert {"quickstart", "medicine"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/compare/*.yaml")), ids=lambda path: path.stem)
def test_shipped_comparison_names_methods_that_exist(path: Path, tmp_path: Path) -> None:
    train, held_out = (write_rows(tmp_path / f"{name}.jsonl", tiny_rows(4)) for name in ("train", "held_out"))
    general = tmp_path / "general.txt"
    general.write_text("Rivers run to the sea.")
    here = [f"data.train={train}", f"data.validation={held_out}", f"data.general_text={general}"]
    cells = read_comparison(path, here).cells
    assert {cell.kind for cell in cells} == {"base", "dense", "joint", "one_shot"}
    # Every budget and seed has its control.
    controls = {(cell.kept, cell.seed) for cell in cells if cell.label.startswith("joint random")}
    assert controls == {(cell.kept, cell.seed) for cell in cells if cell.kept is not None}
