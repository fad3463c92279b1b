"""The table of engines: the launch files that ship are made from it, and what it refuses has a reason and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prunetune.config.engines import ENGINES, FEATURES, launch_settings, markdown, refusal

ROOT = Path(__file__).parents[2]
LAUNCHES = {path.stem: path for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}


def test_every_engine_with_a_launcher_ships_its_file() -> None:
    assert LAUNCHES.keys() == {name for name, engine in ENGINES.items() if engine.distributed_type} | {"multinode"}


@pytest.mark.parametrize("name", sorted(LAUNCHES))
def test_launch_files_are_what_accelerate_reads_and_say_how_to_use_them(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    text = LAUNCHES[name].read_text()
    head = text.split("compute_environment")[0]
    assert f"--config_file configs/accelerate/{name}.yaml" in head
    assert "# Needs:" in head
    settings = load_config_from_file(str(LAUNCHES[name]))
    if name == "multinode":
        assert (settings.num_machines, settings.num_processes) == (2, 2)
    else:
        engine = ENGINES[name]
        assert str(settings.distributed_type).endswith(str(engine.distributed_type))
        assert yaml.safe_load(text) == launch_settings(name, 2, cpu=name == "ddp")


def test_features_name_known_engines_and_one_process_does_everything() -> None:
    for name, feature in FEATURES.items():
        assert feature.refused.keys() <= ENGINES.keys(), name
        assert "single" not in feature.refused, name
        assert "ddp" not in feature.refused, name


@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_refused_names_the_engine_and_a_way_out(feature: str) -> None:
    for engine in ENGINES:
        why = refusal(engine, feature)
        assert (why is not None) == (engine in FEATURES[feature].refused)
        if why is not None:
            assert engine in why
            assert why.endswith(FEATURES[feature].instead)


def test_fsdp_is_not_offered_on_a_cpu() -> None:
    """accelerate turns it into DDP there."""
    assert [name for name, engine in ENGINES.items() if not engine.on_cpu] == ["fsdp2"]


def test_the_page_beside_the_launch_files_is_the_table() -> None:
    page = (ROOT / "configs" / "accelerate" / "README.md").read_text()
    assert page.endswith(markdown())
