"""`prune_once` end to end on tiny models: masked == exported, budgets, caches, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunetune.config.presets import PhaseSteps
from prunetune.config.schema import TargetConfig
from prunetune.core.errors import BudgetError, ConfigError, DataError, ExportError, UnsupportedModelError
from prunetune.export.pruned import PrunedExport
from prunetune.methods.masks import MaskContext, build_mask
from prunetune.methods.scores import SCORES
from prunetune.model.architecture import describe
from prunetune.model.budget import decoder_params, full_shape, plan_shape
from prunetune.model.gates import GateSet
from prunetune.model.layer_stream import LayerStream
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.model.surgery import Surgery
from prunetune.model.units import sites
from prunetune.pipeline import prune_run
from prunetune.pipeline.prune_request import PruneRequest, default_units
from prunetune.pipeline.prune_run import prune_once
from prunetune.pipeline.remembered_judge import RememberedJudge
from tests.contracts.scores import random_rows
from tests.support import MODEL_TYPES, batch, hard_gates, logits, tiny_folder, tiny_rows, write_rows

ROWS = tiny_rows(40)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "base")


def request(base: Path, name: str = "out", kept: str = "65%", units: Any = None, **changes: Any) -> PruneRequest:
    score = changes.get("score", "wanda")
    settings = {
        "calibration": ROWS,
        "tokens": 200,
        "judge_tokens": 60,
        "compensation": "none",
        "dtype": "float32",
        "verify": False,
        **changes,
    }
    target = TargetConfig(kept=kept, units=units or default_units(score), align=8)
    return PruneRequest(str(base), base.parent / name, target, **settings)


def opened(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def masked_logits(base: Path, plan: Plan) -> torch.Tensor:
    """The dense model's logits with the gates closed that the plan removes."""
    model = opened(base)
    arch = describe(model.config)
    found = sites(arch, ("mlp_channels", "kv_groups", "query_heads", "layers"))
    gates = GateSet(model, found)
    gates.attach()
    gates.set(hard_gates(arch, found, plan))
    return logits(model, batch(2, 9, padding=2))


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def no_stream(*args: Any, **kwargs: Any) -> Any:
    pytest.fail("a new pass was made")


UNITS = [("mlp_channels", "kv_groups"), ("mlp_channels", "query_heads"), ("layers",)]


@pytest.mark.parametrize("units", UNITS, ids="+".join)
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_exported_is_the_masked_dense_model(family: str, units: tuple[str, ...], tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", family, tie_word_embeddings=family != "qwen3")
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in random_rows(20)]
    out = prune_once(request(base, kept="70%", units=units, calibration=rows)).folder
    plan = Plan.load(out / "plan.json")
    small = opened(out)
    assert describe(small.config).fingerprint() != describe(opened(base).config).fingerprint()
    difference = float((logits(small, batch(2, 9, padding=2)) - masked_logits(base, plan)).abs().max())
    assert difference < 1e-4


def test_the_folder_holds_plan_scores_and_facts_within_the_budget(base: Path) -> None:
    out = prune_once(request(base)).folder
    arch, plan = describe(opened(base).config), Plan.load(out / "plan.json")
    shape, facts = plan_shape(arch, plan), json.loads((out / "prunetune.json").read_text())
    limit = int(0.65 * decoder_params(arch, full_shape(arch)))
    assert limit - decoder_params(arch, shape) < 8 * 3 * arch.hidden_size * arch.layers, "within one alignment step"
    assert decoder_params(arch, shape) <= limit
    scores = load_file(out / "scores.safetensors")
    assert scores["layers.0.mlp_channels"].shape == (64,)
    kept = plan.kept["layers.0.mlp_channels"]
    assert kept == tuple(sorted(scores["layers.0.mlp_channels"].argsort(descending=True)[: len(kept)].tolist()))
    assert facts["metadata"]["plan"] == plan.digest()
    assert facts["metadata"]["pruned"]["method"] == "one-shot wanda"
    assert facts["verification"] == {}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"} <= {
        file.name for file in out.iterdir()
    }


@pytest.mark.parametrize("name", SCORES.names())
def test_every_score_prunes(name: str, base: Path) -> None:
    out = prune_once(request(base, score=name, kept="70%")).folder
    assert describe(opened(out).config).fingerprint() != describe(opened(base).config).fingerprint()


@pytest.mark.parametrize("name", ["best_uniform", "dynamic_program", "evolutionary", "sensitivity_feedback"])
def test_allocations_that_ask_the_model(name: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"evolutionary": {"generations": 1, "offspring": 2}, "sensitivity_feedback": {"steps": 2}}
    out = prune_once(request(base, allocation=name, options={"allocation": options.get(name, {})})).folder
    origin = Plan.load(out / "plan.json").origin
    assert origin["allocation"] == name
    said = " ".join(capsys.readouterr().out.split())
    assert ("wanted widths of its own in every layer" in said) == any("widths" in r for r in origin["remarks"])


def test_compensation_brings_the_output_nearer(base: Path) -> None:
    dense, found = opened(base), {}
    for name in ("none", "refit"):
        small = opened(prune_once(request(base, name, units=("mlp_channels",), compensation=name)).folder)
        found[name] = 0.0
        for seed in range(4):
            before, after = (logits(model, batch(4, 8, seed=seed)).log_softmax(-1) for model in (dense, small))
            found[name] += float((before - after).square().mean())
    assert found["refit"] < found["none"]


def test_refit_is_the_ridge_solution_on_the_dense_inputs(base: Path) -> None:
    out = prune_once(request(base, compensation="refit", units=("mlp_channels",))).folder
    plan, dense = Plan.load(out / "plan.json"), opened(base)
    kept, inputs = list(plan.kept["layers.0.mlp_channels"]), []
    module = dense.model.layers[0].mlp.down_proj
    module.register_forward_pre_hook(lambda m, args: inputs.append(args[0].reshape(-1, 64)))
    pruning = prune_run._Pruning(request(base))
    with torch.no_grad():
        for row in pruning.rows.draw():
            dense(torch.tensor([row.input_ids]))
    x = torch.cat(inputs).double()
    weight, ridge = module.weight.detach().double(), 0.1 * float((x.square().sum(0)).mean())
    left = x[:, kept].T @ x[:, kept] + ridge * torch.eye(len(kept))
    right = x[:, kept].T @ x @ weight.T + ridge * weight[:, kept].T
    expected = torch.linalg.solve(left, right).T
    found = opened(out).model.layers[0].mlp.down_proj.weight.double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_another_size_or_score_needs_no_new_pass(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_once(request(base, "first", compensation="refit"))
    monkeypatch.setattr(prune_run, "LayerStream", no_stream)
    prune_once(request(base, "smaller", kept="55%", compensation="mask_tuning"))
    prune_once(request(base, "other", score="fluctuation"))
    with pytest.raises(pytest.fail.Exception, match="a new pass"):
        prune_once(request(base, "more", tokens=100))


@pytest.mark.parametrize("change", ["norms", "config"])
def test_statistics_are_of_the_model_as_it_is(change: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all of it: vectors, rows that are not the first, and settings that are no weights."""
    prune_once(request(base, "first"))
    if change == "config":
        changed_config(base, rms_norm_eps=5.0)
    else:
        model = opened(base)
        model.model.norm.weight.data.mul_(2)
        model.save_pretrained(base)
    prune_once(request(base, "second"))
    assert len(list((base.parent / "prune-cache").iterdir())) == 2
    changed_config(base, transformers_version="5.99", use_cache=False)
    monkeypatch.setattr(prune_run, "LayerStream", no_stream)
    prune_once(request(base, "third"))


def test_two_processes_may_keep_the_same_scores_at_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, save_file = [], prune_run.save_file

    def and_the_other_does_all(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        saved.append(path)
        if len(saved) == 1:
            prune_once(request(base, "other", score="taylor"))

    monkeypatch.setattr(prune_run, "save_file", and_the_other_does_all)
    out = prune_once(request(base, "first", score="taylor")).folder
    assert len(saved) == 2
    assert Plan.load(out / "plan.json").kept == Plan.load(base.parent / "other" / "plan.json").kept


def test_scores_that_look_at_the_budget_are_kept_for_it_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """110 KB are more parameters in two bytes each than in four."""

    def of(name: str, dtype: str) -> PruneRequest:
        asked = request(base, name, score="nirvana", options={"score": {"draws": 2}}, dtype=dtype)
        return replace(asked, target=TargetConfig(size="110KB", align=8))

    prune_once(of("first", "float32"))
    monkeypatch.setattr(prune_run, "load_base", no_stream)
    prune_once(of("again", "float32"))
    with pytest.raises(pytest.fail.Exception, match="a new pass"):
        prune_once(of("smaller", "bfloat16"))


def test_only_products_that_are_fitted_to_are_collected(base: Path) -> None:
    prune_once(request(base, compensation="refit", units=("mlp_channels",)))
    [cache] = (base.parent / "prune-cache").iterdir()
    assert {path.name.rpartition("-")[0] for path in cache.glob("*.safetensors")} == {"layer", "products-down"}


@pytest.mark.parametrize("compensation", ["refit", "bias"])
def test_layers_leave_whole_and_nothing_is_compensated(
    compensation: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"compensation": {"ridge": 0.2}} if compensation == "refit" else {}
    asked = request(
        base, score="random", units=("layers",), calibration=None, compensation=compensation, options=options
    )
    origin = Plan.load(prune_once(asked).folder / "plan.json").origin
    assert origin["compensation"] == "none"
    assert origin["options"] == {}
    assert capsys.readouterr().out.count(f"compensation none, not {compensation}") == 1
    assert not (base.parent / "prune-cache").exists()


def test_one_row_judges_with_a_warning(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune_once(request(base, "scored", score="taylor", calibration=ROWS[:1]))
    assert "judged on" not in capsys.readouterr().out
    prune_once(request(base, "judged", allocation="dynamic_program", calibration=ROWS[:1]))
    assert "judged on the row that scores have seen" in " ".join(capsys.readouterr().out.split())


def test_answers_of_another_process_stay(tmp_path: Path) -> None:
    judge = Mock(divergence=Mock(return_value=0.5))
    first, second = (RememberedJudge(lambda: judge, tmp_path / "judged.json") for _ in range(2))
    first.divergence({"a": (0,)})
    second.divergence({"a": (1,)})
    third = RememberedJudge(lambda: judge, tmp_path / "judged.json")
    assert third.divergence({"a": (0,)}) == third.divergence({"a": (1,)}) == 0.5
    assert judge.divergence.call_count == 2


def test_gradient_scores_are_kept_for_another_size(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_once(request(base, "first", score="taylor"))
    monkeypatch.setattr(prune_run, "load_base", no_stream)
    prune_once(request(base, "smaller", kept="55%", score="taylor"))
    with pytest.raises(pytest.fail.Exception, match="a new pass"):
        prune_once(request(base, "other", score="taylor", options={"score": {"order": "first"}}))


def test_what_was_measured_once_is_not_measured_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dynamic program's curves are the same for every budget: the model is not even loaded."""
    first = prune_once(request(base, "first", allocation="dynamic_program")).folder
    monkeypatch.setattr(prune_run, "load_base", no_stream)
    again = prune_once(request(base, "again", allocation="dynamic_program")).folder
    prune_once(request(base, "smaller", kept="55%", allocation="dynamic_program"))
    assert Plan.load(first / "plan.json").digest() == Plan.load(again / "plan.json").digest()
    with pytest.raises(pytest.fail.Exception, match="a new pass"):
        prune_once(request(base, "finer", allocation="dynamic_program", options={"allocation": {"share": 1}}))


def test_how_rows_are_batched_does_not_change_the_plan(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with other memory limits decide the same."""
    first = Plan.load(prune_once(request(base, "first")).folder / "plan.json")
    monkeypatch.setattr(prune_run, "BATCH_TOKENS", 16)
    second = prune_once(request(base, "second", cache=base.parent / "other")).folder
    assert Plan.load(second / "plan.json").digest() == first.digest()


def test_equal_scores_are_cut_by_index(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"mlp_channels": 64, "kv_groups": 3}
    monkeypatch.setattr(SCORES.get("wanda"), "units", lambda self, facts, kind: torch.ones(sizes[kind]))
    plan = Plan.load(prune_once(request(base)).folder / "plan.json")
    assert plan.kept
    assert all(kept == tuple(range(len(kept))) for kept in plan.kept.values())


@pytest.mark.parametrize("compensation", ["bias", pytest.param("refit", marks=pytest.mark.slow)])
def test_the_export_is_proven_in_a_fresh_process(compensation: str, base: Path) -> None:
    exported = prune_once(request(base, compensation=compensation, dtype="bfloat16", verify=True))
    found = exported.verification
    assert found["reload_difference"] <= found["tolerance"] == 1e-4
    assert found["generated_tokens"] == 64
    assert found["class"].endswith("LlamaForCausalLM")


def test_a_wrong_cut_is_found_and_nothing_is_left(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Surgery.slice_parameter

    def wrong(self: Surgery, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        sliced = right(self, name, tensor)
        return sliced.roll(1, 0) if sliced is not None and name.endswith("1.mlp.up_proj.weight") else sliced

    monkeypatch.setattr(Surgery, "slice_parameter", wrong)
    with pytest.raises(ExportError, match="differs from the masked dense model"):
        prune_once(request(base, verify=True))
    assert sorted(path.name for path in base.parent.iterdir()) == ["base", "prune-cache"]


def test_bias_is_added_where_the_class_can_say_it(base: Path) -> None:
    out = prune_once(request(base, compensation="bias", kept="70%")).folder
    small, arch = opened(out), describe(opened(base).config)
    assert small.config.mlp_bias
    assert small.config.attention_bias == ("kv_groups" in str(Plan.load(out / "plan.json").kept))
    layer = small.model.layers[0]
    assert layer.mlp.down_proj.bias.abs().sum() > 0
    assert layer.mlp.gate_proj.bias.abs().sum() == 0
    assert decoder_params(describe(small.config), full_shape(describe(small.config))) <= 0.70 * decoder_params(
        arch, full_shape(arch)
    )


def test_linears_that_lose_nothing_get_no_bias(base: Path) -> None:
    """93% is one step of the MLPs, so attention stays whole and has no bias that could only be zero."""
    small = opened(prune_once(request(base, compensation="bias", kept="93%")).folder)
    assert describe(small.config).kv_groups == 3
    assert small.config.mlp_bias
    assert not small.config.attention_bias


@pytest.mark.parametrize("units", [("mlp_channels",), ("mlp_channels", "kv_groups")])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_bias_is_refused_where_the_class_cannot_say_it(family: str, units: tuple[str, ...], tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", family)
    with pytest.raises(UnsupportedModelError, match=r"mlp.down_proj, and a \w+ config cannot say one; take refit"):
        prune_once(request(base, compensation="bias", units=units))


def test_a_base_with_biases_gets_them_changed(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", attention_bias=True, mlp_bias=True)
    small = opened(prune_once(request(base, compensation="bias", units=("mlp_channels",))).folder)
    before, after = (model.model.layers[0].mlp for model in (opened(base), small))
    assert not torch.equal(before.down_proj.bias, after.down_proj.bias)
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert torch.equal(before.gate_proj.bias[list(plan.kept["layers.0.mlp_channels"])], after.gate_proj.bias)


def test_a_joint_run_can_start_from_the_plan(base: Path) -> None:
    out = prune_once(request(base)).folder
    arch = describe(opened(base).config)
    planner = Planner(arch, TargetConfig(kept="65%", align=8))
    mask = build_mask("static", {"plan": str(out / "plan.json")}, MaskContext(planner, PhaseSteps(2, 6, 9), 0))
    assert mask.plan({}).digest() == Plan.load(out / "plan.json").digest()


def test_all_problems_are_said_at_once_before_anything_is_read(tmp_path: Path) -> None:
    wrong = PruneRequest(
        "nowhere",
        tmp_path / "out",
        TargetConfig(kept="60%", units=("layers", "mlp_channels")),
        score="wandaa",
        allocation="unifrom",
        options={"compensation": {"ridge": -1, "tokens": 300}},
    )
    with pytest.raises(ConfigError) as caught:
        prune_once(wrong)
    said = str(caught.value)
    parts = ("did you mean 'wanda'", "did you mean 'uniform'", "compensation.ridge", "--tokens", "take layers alone")
    assert [part for part in parts if part not in said] == []


def test_methods_that_look_at_inputs_need_rows(base: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prune_once(request(base, calibration=None, compensation="refit", allocation="dynamic_program"))
    assert str(caught.value).count("name a file of rows") == 3
    prune_once(request(base, calibration=None, score="magnitude"))
    assert not (base.parent / "prune-cache").exists()


def test_impossible_budgets_bad_rows_and_taken_folders(base: Path) -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        prune_once(request(base, kept="1%"))
    with pytest.raises(DataError):
        prune_once(request(base, calibration=[{"nothing": "here"}]))
    prune_once(request(base, score="random"))
    with pytest.raises(ConfigError, match="exists"):
        prune_once(request(base, score="random"))
    prune_once(request(base, score="random", replace=True))


def test_what_cannot_be_written_is_refused_before_anything_long(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_run, "LayerStream", no_stream)
    (base.parent / "taken").mkdir()
    with pytest.raises(ConfigError, match="taken exists; name another folder, or add --overwrite"):
        prune_once(request(base, "taken"))
    with pytest.raises(ConfigError, match="--dtype: int8 is not float32"):
        prune_once(request(base, dtype="int8"))
    with pytest.raises(ExportError, match="holds something else than an export"):
        prune_once(request(base, "base", replace=True))
    changed_config(base, quantization_config={"load_in_4bit": True})
    with pytest.raises(UnsupportedModelError, match="quantised"):
        prune_once(request(base))


def test_one_layer_is_in_memory_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, forward = [], LayerStream.forward

    def watched(self: LayerStream, hidden: torch.Tensor) -> torch.Tensor:
        held = {n.split(".")[2] for n, p in self.model.named_parameters() if p.device.type != "meta"}
        most.append(len(held))
        return forward(self, hidden)

    monkeypatch.setattr(LayerStream, "forward", watched)
    monkeypatch.setattr(prune_run, "load_base", no_stream)
    prune_once(request(base, compensation="refit"))
    assert set(most) == {1}
    assert PrunedExport.shard_size == 10**9


def test_default_units_are_what_the_score_ranks() -> None:
    assert default_units("wanda") == ("mlp_channels", "kv_groups")
    assert default_units("cfsp") == ("mlp_channels",)
    assert default_units("block_influence") == ("layers",)


def test_rows_for_judging_are_not_calibrated_on(tmp_path: Path, base: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", tiny_rows(30, seed=4))
    rows = prune_run._Pruning(request(base, calibration=str(path))).rows
    drawn = {tuple(row.input_ids) for number in range(3) for row in rows.draw(number)}
    judged = {tuple(row.input_ids) for row in rows.judged}
    assert judged
    assert not drawn & judged
    assert rows.draw(1) != rows.draw(2)
