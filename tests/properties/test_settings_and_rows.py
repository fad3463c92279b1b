"""Configurations and data rows of any kind: they work, or one of our errors says why not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prunetune.config.load import load_config
from prunetune.config.presets import derive, total_steps
from prunetune.config.schema import DataConfig, RunConfig
from prunetune.core.errors import ConfigError, DataError, PrunetuneError
from prunetune.data.load import load_bundle
from prunetune.model.planner import Planner
from prunetune.pipeline.checks import check_methods
from prunetune.pipeline.folder import read_config, resolved_text
from tests.properties.strategies import JSON, SCALARS, as_json, damaged, mutated
from tests.properties.tiers import run, tiers
from tests.support import tiny_arch, tiny_rows, tiny_tokenizer

_SETTINGS = yaml.safe_load(resolved_text(RunConfig(model="m", target="60%")))
_KEYS = sorted(f"{section}.{key}" for section, of in _SETTINGS.items() if isinstance(of, dict) for key in of)


@given(mutated(_SETTINGS), st.lists(st.tuples(st.sampled_from(_KEYS), SCALARS), max_size=2))
def settings_work_or_are_refused(folder: Path, settings: Any, overrides: list[tuple[str, Any]]) -> None:
    path = folder / "run.yaml"
    try:
        path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    try:
        config = load_config(path, [f"{key}={value}" for key, value in overrides], checks=[check_methods])
    except ConfigError:
        return
    assert load_config(path, [f"{key}={value}" for key, value in overrides]) == config
    path.write_text(resolved_text(config), encoding="utf-8")
    assert load_config(path).model_dump() == config.model_dump(), "what a run records is what it was"
    steps = total_steps(config.train, 100)
    assert steps >= 1
    assert derive(config, steps)
    try:
        Planner(tiny_arch(), config.target, config.export.dtype)
    except PrunetuneError:
        return


@given(damaged(resolved_text(RunConfig(model="m", target="60%")).encode()))
def text_that_is_no_settings_is_refused(folder: Path, text: bytes) -> None:
    (folder / "resolved.yaml").write_bytes(text)
    for read in (lambda: load_config(folder / "resolved.yaml"), lambda: read_config(folder)):
        with contextlib.suppress(ConfigError):
            read()


_ROWS: list[Any] = [
    *tiny_rows(3),
    {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]},
    {"text": "w1 w2 w3"},
    {"instruction": "w1", "input": "", "output": "w2"},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w4"}]},
]


@given(
    st.lists(st.sampled_from(_ROWS).flatmap(lambda row: st.just(row) | mutated(row) | JSON), max_size=6),
    st.sampled_from(["auto", "prompt_completion", "messages", "alpaca", "text", "tokens"]),
    st.booleans(),
    st.sampled_from([".jsonl", ".json", ".csv"]),
)
def rows_work_or_are_refused(folder: Path, rows: list[Any], layout: str, chat: bool, suffix: str) -> None:
    path = folder / f"rows{suffix}"
    lines = [as_json(row) for row in rows]
    path.write_text(f"[{','.join(lines)}]" if suffix == ".json" else "\n".join(lines), encoding="utf-8")
    config = DataConfig(train=str(path), format=layout, validation_rows=2, general_text=str(folder / "prose.txt"))
    (folder / "prose.txt").write_text("w1 w2")
    try:
        bundle = load_bundle(config, tokenizer=tiny_tokenizer(chat), max_length=16)
    except DataError:
        return
    assert len(bundle.train) >= 1
    assert len(bundle.validation) >= 1
    assert bundle.facts["target_tokens"] >= 1


@given(damaged("".join(as_json(row) + "\n" for row in tiny_rows(4)).encode()))
def damaged_rows_work_or_are_refused(folder: Path, content: bytes) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    (folder / "prose.txt").write_text("w1 w2")
    config = DataConfig(train=str(path), general_text=str(folder / "prose.txt"))
    with contextlib.suppress(DataError):
        load_bundle(config, tokenizer=tiny_tokenizer(), max_length=16)


@tiers(
    settings_work_or_are_refused,
    text_that_is_no_settings_is_refused,
    rows_work_or_are_refused,
    damaged_rows_work_or_are_refused,
)
def test_property(tmp_path: Path, capsys: pytest.CaptureFixture[str], holds: Any, cases: int) -> None:
    run(holds, cases, tmp_path)
