"""A run that keeps a part of what it learnt: what is exported, proved and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunetune.config.load import load_config
from prunetune.core.errors import ConfigError
from prunetune.export.changed import live_deltas, with_deltas
from prunetune.methods.deltas import DELTAS, build_delta, context_of
from prunetune.model.plan import Plan
from prunetune.model.resolve import resolve_model
from prunetune.model.surgery import Surgery
from prunetune.pipeline.checks import check_methods
from prunetune.pipeline.export_run import export_run
from prunetune.pipeline.loading import load_trained
from prunetune.pipeline.run import RunReport, run
from tests.pipeline.test_run import configure
from tests.support import logits, tiny_arch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with model and data that all runs here share."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("delta")


@pytest.fixture(scope="module")
def done(root: Path) -> RunReport:
    """A run that drops half of its delta by darex_q, its export verified in a fresh process."""
    changes: dict[str, Any] = {"delta": {"method": "darex_q", "drop": "50%"}, "evaluate": {"rows": 4}}
    return run(
        configure(root, **changes, data={"validation_rows": 16, "validation_fraction": "30%"}, export={"verify": True})
    )


def exported(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trained(root: Path, folder: Path) -> tuple[Any, Surgery]:
    model, _ = load_trained(folder, resolve_model(str(root / "model")), "float32")
    return model.eval(), Surgery(tiny_arch(tie_word_embeddings=True), Plan.load(folder / "plan.json"))


def test_what_is_exported_is_the_pruned_delta(done: RunReport, root: Path) -> None:
    model, surgery = trained(root, done.folder)
    whole, facts = live_deltas(model, surgery), json.loads((done.folder / "delta.json").read_text())
    found, before = exported(done.folder / "compact"), model.get_base_model()
    compared = 0
    for name, delta in whole.items():
        base = before.get_submodule(name.removesuffix(".weight")).base_layer.weight
        change = found.get_parameter(name) - base
        method = build_delta("darex_q", {"drop": 0.5, "q": facts["q"][name]})
        expected = method.apply(delta, context_of(0, "run")).whole()
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-4)
        assert 0.3 < float((expected == 0).float().mean()) < 0.7
        compared += 1
    assert compared == len(facts["q"]) > 10
    assert done.exported is not None
    assert done.exported.verification["merge_difference"] <= 1e-4


def test_the_live_model_with_its_pruned_deltas_is_the_exported_one(done: RunReport, root: Path) -> None:
    model, surgery = trained(root, done.folder)
    untouched, facts = logits(model), json.loads((done.folder / "delta.json").read_text())
    deltas = {
        name: build_delta("darex_q", {"drop": 0.5, "q": facts["q"][name]}).apply(delta, context_of(0, "run"))
        for name, delta in live_deltas(model, surgery).items()
    }
    with with_deltas(model, deltas):
        pruned = logits(model)
    assert (pruned - logits(exported(done.folder / "compact"))).abs().max() <= 1e-4
    assert not torch.allclose(pruned, untouched)
    assert torch.equal(logits(model), untouched)


def test_masks_are_those_of_the_dense_model(done: RunReport, root: Path) -> None:
    model, surgery = trained(root, done.folder)
    name = next(name for name in live_deltas(model, surgery) if "down_proj" in name)
    delta = live_deltas(model, surgery)[name]
    assert delta.place.shape == (48, 64)
    assert delta.shape[1] < 64
    assert delta.place.columns is not None
    found = build_delta("dare", {"drop": 0.5}).apply(delta, context_of(3, "run")).whole() != 0
    dense = type(delta.place)(delta.place.name, delta.place.shape)
    ones = type(delta)(dense, torch.ones(1, 64), torch.ones(48, 1), 1.0)
    expected = build_delta("dare", {"drop": 0.5}).apply(ones, context_of(3, "run")).whole() != 0
    assert torch.equal(found, expected[:, delta.place.columns])


def test_the_curve_is_recorded_and_reported(done: RunReport) -> None:
    facts = json.loads((done.folder / "delta.json").read_text())
    assert [point["drop"] for point in facts["curve"]] == [0.0, 0.5, 0.9, 0.95, 0.99]
    assert facts["searched_on"].endswith("held-out rows that no table is made from")
    searched = facts["curve"][2]
    assert searched["searched"] == "multiplier"
    assert len(searched["tried"]) >= 3
    assert facts["options"]["q"] == "closed_form"
    assert 0.5 <= min(facts["q"].values()) <= max(facts["q"].values()) <= 1
    assert (done.folder / "figures" / "delta.png").stat().st_size > 0
    for text in ((done.folder / "report.html").read_text(), (done.folder / "README.md").read_text()):
        assert "darex_q dropped 50.0%" in text
        assert f"{facts['curve'][4]['perplexity']:.2f}" in text


def test_exported_again_it_is_the_same(done: RunReport, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.export.write.verify_export", lambda *args: {})  # it was verified before
    again = export_run(done.folder, root / "again").folder
    assert torch.equal(logits(exported(again)), logits(exported(done.folder / "compact")))


def test_dropping_nothing_changes_nothing(root: Path) -> None:
    plain = run(configure(root, "plain", evaluate={"enabled": False}))
    nothing = run(configure(root, "nothing", evaluate={"enabled": False}, delta={"method": "dare", "drop": 0}))
    found, wanted = (exported(report.folder / "compact").state_dict() for report in (nothing, plain))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not (plain.folder / "delta.json").exists()


@pytest.mark.parametrize("delta", [{"method": "magnitude", "drop": 0.8}, {"method": "rank"}])
def test_other_methods_and_few_rows(delta: dict[str, Any], root: Path) -> None:
    report = run(configure(root, delta["method"], evaluate={"rows": 6}, delta=delta))
    facts = json.loads((report.folder / "delta.json").read_text())
    assert "training rows" in facts["searched_on"]
    assert facts["q"] == {}
    assert facts["perplexity"] > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["delta.drop=90%"], "set it to darex_q"),
        (["delta=darx"], "did you mean 'darex'"),
        (["delta=dare", "delta.drop=150%"], "too large"),
        (["delta.strength=1"], "without delta.regularize"),
        (["delta=rank", "delta.outliers=1"], "no such option"),
    ],
)
def test_what_cannot_work_is_said(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, ["model=smollm2-135m", "target=60%", *words], checks=[check_methods])


def test_the_short_form_names_the_method() -> None:
    config = load_config(None, ["model=smollm2-135m", "target=60%", "delta=darex_q", "delta.drop=95%"])
    assert (config.delta.method, config.delta.drop, config.delta.keeps_all) == ("darex_q", 0.95, False)
    assert config.prune().delta == config.delta


def test_darex_is_another_name_of_darex_q() -> None:
    words = ["delta.method=darex", "delta.drop=90%", "delta.regularize=l2"]
    config = load_config(None, ["model=smollm2-135m", "target=60%", *words], checks=[check_methods])
    assert type(build_delta(config.delta.method, config.delta.method_options())) is DELTAS.get("darex_q")
    assert "darex" not in DELTAS.names()
    assert DELTAS.aliases("darex_q") == ["darex"]
