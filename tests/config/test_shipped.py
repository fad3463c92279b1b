"""Every YAML that ships is a valid configuration, and its header says how to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prunetune.config.load import load_config
from prunetune.config.presets import phase_steps
from prunetune.pipeline.checks import check_methods

ROOT = Path(__file__).parents[2]
RUNS = [ROOT / "configs" / "quickstart.yaml", *sorted((ROOT / "configs" / "presets").glob("*.yaml"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_shipped_runs_are_valid(path: Path, tmp_path: Path) -> None:
    rows = [tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"]
    for file in rows:
        file.write_text("{}\n")
    own = yaml.safe_load(path.read_text()).get("data", {})
    overrides = [f"data.{key}={file}" for key, file in zip(("train", "validation"), rows) if "/" in own.get(key, "")]
    config = load_config(path, overrides, [check_methods])
    assert path.read_text().count(f"prunetune train {name_of(path)}") == 1
    assert config.folder.parts[0] == "runs"


def test_quickstart_is_sized_for_two_cores() -> None:
    config = load_config(RUNS[0], checks=[check_methods])
    assert (config.model.name, config.data.train, config.target.kept) == ("smollm2-135m", "pydocs", 0.6)
    assert config.folder == Path("runs/quickstart")
    assert config.train.max_steps * config.train.batch_size * config.train.max_length <= 130_000
    assert phase_steps(config.phases, config.train.max_steps).search >= 10


def test_a_missing_data_file_of_a_preset_is_named() -> None:
    from prunetune.core.errors import ConfigError

    with pytest.raises(ConfigError, match=r"medicine\.yaml:\d+: data\.train: .* does not exist"):
        load_config(ROOT / "configs" / "presets" / "medicine.yaml")
