"""Combinations of settings that cannot work are refused before anything starts; doubtful ones are pointed out."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunetune.config import rules
from prunetune.config.load import load_config
from prunetune.core.errors import ConfigError

BASE = ["model=some-model", "target=60%"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["target.units=[mlp_channels,mlp_channels]"], "target.units"),
        (["target.units=[kv_groups]", "target.align=32"], "target.align"),
        (["data.validation_fraction=0"], "data.validation_fraction"),
        (["data.validation_fraction=100%"], "data.validation_fraction"),
        (["data.train=a/b", "data.validation=a/b"], "data.validation"),
        (["data.validation=a/b", "data.validation_fraction=20%"], "data.validation_fraction"),
        (["data.format=text"], "data.format"),
        (["data.general_text=nothing.txt"], "data.general_text"),
        (["data.train=./nothing"], "data.train"),
        (["train.assistant_only=true"], "train.assistant_only"),
        (["data.train=a/b", "data.format=alpaca", "train.assistant_only=true"], "train.assistant_only"),
        (["data.train=a/b", "data.format=text", "train.completion_only=true"], "train.completion_only"),
        (["train.max_steps=0"], "train.max_steps"),
        (["train.max_steps=2"], "train.max_steps"),
        (["train.max_steps=20", "train.warmup_steps=20"], "train.warmup_steps"),
        (["train.warmup_steps=2.5"], "train.warmup_steps"),
        (["train.scheduler=sawtooth"], "train.scheduler"),
        (["train.sft.learning_rate=1"], "train.sft.learning_rate"),
        (["train.sft.nonsense=1"], "train.sft.nonsense"),
        (["lora.targets=[]"], "lora.targets"),
        (["lora.targets='q_proj,v_proj'"], "lora.targets"),
        (["folder=runs/a", "export.folder=runs/a"], "export.folder"),
        (["folder=runs/a", "export.folder=runs"], "export.folder"),
        (["folder=runs/a", "export.folder=runs/a/train/out"], "export.folder"),
        (["evaluate.enabled=false", "evaluate.compare=dense"], "evaluate.compare"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, BASE + overrides)
    [problem] = caught.value.problems
    assert f"{problem.where} {problem.field}".find(field) >= 0
    assert len(problem.message) > 20


def test_defaults_pass() -> None:
    assert rules.check(load_config(None, BASE)) == []


def test_the_base_model_is_never_written_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base model's folder"):
        load_config(None, [f"model={tmp_path}", "target=60%", f"folder={tmp_path}"])


def test_a_misspelt_data_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean .*train\.jsonl"):
        load_config(None, [*BASE, f"data.train={tmp_path}/trian.jsonl"])


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    config = load_config(None, BASE).model_copy()
    config = config.model_copy(update={"train": config.train.model_copy(update={"report_to": ("wandb",)})})
    assert [problem.message for problem in rules.check(config)] == [
        "wandb is not installed; pip install wandb, or remove it"
    ]


@pytest.mark.parametrize(
    ("overrides", "steps", "said"),
    [
        (["target=100%"], None, "plain LoRA"),
        (["target=20%"], None, "below about 30%"),
        (["phases.search=85%"], None, "leave 10% of the steps to recover"),
        (["train.max_steps=50", "train.epochs=3"], 50, "train.epochs is not used"),
        (["evaluate.rows=900"], None, "at most data.validation_rows 400"),
        ([], 10, "noisy"),
        (["train.save_every=500"], 100, "beyond the last step"),
        (["train.warmup_steps=90"], 100, "still rises at the freeze"),
    ],
)
def test_doubtful_settings_are_pointed_out(overrides: list[str], steps: int | None, said: str) -> None:
    assert any(said in text for text in rules.cautions(load_config(None, BASE + overrides), steps))


def test_defaults_raise_no_doubts() -> None:
    assert rules.cautions(load_config(None, BASE), 200) == []


def test_a_temperature_without_distillation_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: some-model\ntarget: 60%\ndistill: {temperature: 2}\n")
    with pytest.raises(ConfigError, match=r"distill\.temperature.*not used without distill\.weight"):
        load_config(file)
