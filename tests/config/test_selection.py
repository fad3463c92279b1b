"""data.samples, data.tokens, data.online: short forms, overrides, what cannot work, what may not be meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prunetune.config import rules
from prunetune.config.load import load_config
from prunetune.config.presets import derive
from prunetune.config.schema import OnlineConfig, RunConfig, SelectionConfig
from prunetune.config.selection_rules import INFOBATCH, active_steps, row_count, step_cost
from prunetune.core.errors import ConfigError
from prunetune.methods.online import scoring_passes
from prunetune.methods.samples import SAMPLES
from prunetune.pipeline.checks import check_methods
from prunetune.pipeline.folder import resolved_text

BASE = ["model=some-model", "target=60%"]


def load(*overrides: str, file: Path | None = None) -> RunConfig:
    return load_config(file, [*BASE, *overrides], [check_methods])


def test_nothing_is_chosen_by_default() -> None:
    assert load().selection() is None
    assert not any(item.name in ("rows", "target tokens") for item in derive(load(), 80))


def test_short_form_and_dotted_overrides_reach_the_same_section(tmp_path: Path) -> None:
    long = load("data.samples.method=q_tuning", "data.samples.kept=25%", "data.samples.normalise=rank", "seed=4")
    assert load("data.samples=q_tuning", "data.samples.kept=25%", "data.samples.normalise=rank", "seed=4") == long
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  samples: q_tuning\n")
    assert load("data.samples.kept=25%", "data.samples.normalise=rank", "seed=4", file=file) == long
    select = long.selection()
    assert select is not None
    assert select.seed == 4
    assert select.samples.options() == {"normalise": "rank"}


def test_another_method_keeps_the_share_and_drops_the_options(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data:\n  samples: {method: q_tuning, kept: 25%, normalise: rank}\n"
        "  tokens: {method: neighbour_perplexity, kept: 70%, scope: sample, floor: 20%}\n"
    )
    select = load("data.samples.method=random", "data.tokens=loss", file=file).selection()
    assert select == SelectionConfig(
        samples={"method": "random", "kept": 0.25},
        tokens={"method": "loss", "kept": 0.7, "scope": "sample", "floor": 0.2},
    )


def test_resolved_configuration_says_it_and_reads_back() -> None:
    import yaml

    config = load("data.samples=q_tuning", "data.samples.kept=25%", "data.samples.normalise=rank")
    again = RunConfig(**yaml.safe_load(resolved_text(config)))
    assert again == config
    assert yaml.safe_load(resolved_text(config))["data"]["online"] == {"warmup": 0.0, "anneal": 0.0, "rescore_after": 0}


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["data.samples.kept=50%"], "data.samples.kept"),
        (["data.samples.normalise=rank"], "data.samples.normalise"),
        (["data.tokens.kept=50%"], "data.tokens.kept"),
        (["data.tokens.scope=sample"], "data.tokens.scope"),
        (["data.tokens.floor=20%"], "data.tokens.floor"),
        (["data.online.warmup=10%"], "data.online.warmup"),
        (["data.online.rescore_after=5"], "data.online.rescore_after"),
        (["data.online.warmup=60%", "data.online.anneal=50%"], "data.online"),
        (["data.samples=loss", "data.samples.kept=0%"], "data.samples.kept"),
        (["data.samples=loss", "data.online.warmup=60%", "data.online.anneal=40%"], "data.online"),
        (["data.samples=loss", "train.packing=true"], "train.packing"),
        (["data.tokens=loss", "train.packing=true"], "train.packing"),
        (["data.samples=infobatch", "data.samples.kept=50%"], "data.samples.kept"),
        (["data.samples=infobatch", "data.online.rescore_after=5"], "data.online.rescore_after"),
        (["data.samples=infobatch", "data.tokens=loss"], "data.samples.weighted"),
        (["data.samples=less"], "data.samples.method"),
        (["data.samples=q_tunning"], "data.samples.method"),
        (["data.samples=q_tuning", "data.samples.normalize=rank"], "data.samples.normalize"),
        (["data.tokens=token_cleaning"], "data.tokens.method"),
        (["data.tokens=paragraph_surprisal"], "data.tokens.method"),
        (["data.tokens=no_such"], "data.tokens.method"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(overrides: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    [problem] = caught.value.problems
    assert field in f"{problem.where} {problem.field}"
    assert len(problem.message) > 20


def test_infobatch_without_weights_goes_with_tokens() -> None:
    load("data.samples=infobatch", "data.samples.weighted=false", "data.tokens=loss", "data.tokens.kept=50%")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.samples=loss"], "every row is scored"),
        (["data.tokens=loss"], "all of them stay"),
        (["data.samples=infobatch"], "12.5%"),
    ],
)
def test_what_may_not_be_meant_is_pointed_out(overrides: list[str], said: str) -> None:
    assert any(said in text for text in rules.cautions(load(*overrides), 80))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.samples=q_tuning", "data.samples.kept=25%", "data.tokens=loss", "data.tokens.kept=70%"],
        ["data.samples=infobatch", "data.online.anneal=12.5%"],
    ],
)
def test_published_settings_raise_no_caution(overrides: list[str]) -> None:
    assert rules.cautions(load(*overrides), 80) == rules.cautions(load(), 80)


def test_steps_in_which_something_is_chosen() -> None:
    active = active_steps(OnlineConfig(warmup="10%", anneal="12.5%"), 80)
    assert [step for step in range(80) if step in active] == list(range(8, 70))
    assert len([step for step in range(7) if step in active_steps(OnlineConfig(), 7)]) == 7


def test_share_of_rows_is_rounded_and_never_none() -> None:
    assert [row_count(0.25, rows) for rows in (1, 2, 4, 7, 8, 30)] == [1, 1, 1, 2, 2, 8]
    assert row_count(1.0, 7) == 7


@pytest.mark.parametrize(
    ("overrides", "cost"),
    [
        ([], 1.0),
        (["data.samples=loss", "data.samples.kept=12.5%"], 0.625),
        (["data.samples=loss", "data.samples.kept=25%"], 0.75),
        (["data.samples=loss", "data.samples.kept=50%"], 1.0),
        (["data.samples=loss", "data.samples.kept=25%", "train.activation_checkpointing=true"], 1.75 / 3),
        (["data.samples=loss", "data.samples.kept=25%", "data.online.warmup=50%"], 0.875),
        (["data.tokens=loss", "data.tokens.kept=50%"], 1.5),
        (["data.samples=infobatch"], 1.0),
        (["data.samples=random", "data.samples.kept=25%"], 0.25),
        (["data.tokens=excess_loss", "data.tokens.kept=50%"], 2.0),
    ],
)
def test_cost_of_a_step_follows_the_published_table(overrides: list[str], cost: float) -> None:
    config = load(*overrides)
    assert step_cost(config, 80, scoring_passes(config.selection())) == pytest.approx(cost)


def test_derived_values_are_printed_with_reasons() -> None:
    config = load(
        *("data.samples=q_tuning", "data.samples.kept=25%", "data.tokens=loss", "data.tokens.kept=70%"),
        *("data.online.warmup=10%", "data.online.rescore_after=5", "train.accumulate=2"),
    )
    shown = {item.name: f"{item.value} {item.reason}" for item in derive(config, 80)}
    assert "4 of 16" in shown["rows"]
    assert "q_tuning" in shown["rows"]
    assert "70%" in shown["target tokens"]
    assert "steps 8 to 80" in shown["chosen in"]
    assert "5 steps" in shown["scored anew"]


def test_the_method_that_chooses_once_an_epoch_is_the_one_the_rules_know() -> None:
    assert [name for name, kind in SAMPLES.items() if kind.per_epoch] == [INFOBATCH]


def test_checking_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from prunetune.config.load import load_config\n"
        "from prunetune.pipeline.checks import check_methods\n"
        f"load_config(None, {[*BASE, 'data.samples=q_tuning', 'data.tokens=loss']!r}, [check_methods])\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0
