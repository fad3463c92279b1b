"""Merging without loading: equal to PEFT and to slicing, resumable, the same for any shards and blocks."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prunetune.core.errors import ConfigError, ExportError, PlanMismatchError, UnsupportedModelError
from prunetune.export import stream_merge
from prunetune.export.combine import HOWS, combine
from prunetune.export.stream_merge import MergeSettings
from prunetune.model.architecture import describe
from prunetune.model.deltas import Place
from prunetune.model.shards import ShardReader
from prunetune.model.surgery import slice_model
from prunetune.model.tuned import Adapter, BaseSlices
from prunetune.pipeline.merge_request import MergeRequest
from prunetune.pipeline.merge_run import delta_info, merge_run
from tests.support import MODEL_TYPES, batch, logits, random_plan, tiny_model, tiny_tokenizer

EVERYTHING = "all-linear"


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed=0, **config) -> Path:
    """A random adapter, saved as PEFT saves it."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": EVERYTHING, "init_lora_weights": False, **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.03)
                if "magnitude" in name:
                    parameter.abs_().add_(0.5)
    model.save_pretrained(folder)
    return folder


def by_peft(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return model.merge_and_unload().state_dict()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = ShardReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def test_an_adapters_factors_are_read_one_module_at_a_time(base, tmp_path, monkeypatch):
    found, read = Adapter(adapter(base, tmp_path / "adapter")), []
    monkeypatch.setattr(
        ShardReader, "read", lambda self, name, whole=ShardReader.read: read.append(name) or whole(self, name)
    )
    slices = BaseSlices(ShardReader(base), {})
    name, shape = next(iter(found.changed(slices).items()))
    module = name.removesuffix(".weight")
    assert found.scale(module) == 1.5
    assert not read
    found.delta(Place(name, shape), slices)
    assert read == [f"base_model.model.{module}.lora_{kind}.weight" for kind in "AB"]


def merged(tmp_path: Path, folders, base: Path, name="merged", **request) -> Path:
    merge_run(MergeRequest(folders, str(base), **request), tmp_path / name)
    return tmp_path / name


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {"k_proj": 31}},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["lm_head", "up_proj"]},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_peft(kind, base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter", **CONFIGS[kind])
    expected, found = by_peft(base, tuned), tensors(merged(tmp_path, [tuned], base))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5, msg=name)
    changed = [name for name in found if not torch.equal(found[name], tensors(base)[name])]
    assert changed


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_opens_and_computes_what_the_adapter_did(model_type, tmp_path):
    base = saved(tiny_model(model_type, tie_word_embeddings=True), tmp_path / "base")
    tuned = adapter(base, tmp_path / "adapter")
    out = merged(tmp_path, [tuned], base)
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tuned)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(plain.eval()), logits(with_adapter.eval()), atol=1e-3, rtol=1e-4)
    assert "lm_head.weight" not in ShardReader(out).entries


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_one_side_of_a_tie_alone_tears_it(targets, tmp_path):
    base = saved(tiny_model(tie_word_embeddings=True), tmp_path / "base")
    tuned = adapter(base, tmp_path / "adapter", target_modules=targets)
    out = merged(tmp_path, [tuned], base)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tuned)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(plain.eval()), logits(with_adapter.eval()), atol=1e-3, rtol=1e-4)


def test_a_tuned_model_is_found_again(base, tmp_path):
    tuned = saved(tiny_model(seed=5, tie_word_embeddings=False), tmp_path / "tuned")
    found, expected = tensors(merged(tmp_path, [tuned], base)), tensors(tuned)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_dropping_nothing_is_merging_and_dropping_all_is_the_base(base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    plain = tensors(merged(tmp_path, [tuned], base, "plain"))
    none = tensors(merged(tmp_path, [tuned], base, "none", delta="dare", options={"drop": "0%"}))
    everything = tensors(merged(tmp_path, [tuned], base, "all", delta="dare", options={"drop": "100%"}))
    before = tensors(base)
    assert all(torch.equal(none[name], plain[name]) for name in plain)
    assert all(torch.equal(everything[name], before[name]) for name in before)


@pytest.mark.parametrize("delta", ["dare", "magnitude", "della", "structural", "rank"])
def test_shards_and_blocks_change_nothing(delta, base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    options = {} if delta == "rank" else {"drop": 0.5}
    whole = tensors(merged(tmp_path, [tuned], base, "whole", delta=delta, options=options))
    small = MergeSettings(shard_size=20_000, block_bytes=1)
    out = merged(tmp_path, [tuned], base, "small", delta=delta, options=options, settings=small)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert (out / "model.safetensors.index.json").is_file()
    for name, tensor in tensors(out).items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-5)
    AutoModelForCausalLM.from_pretrained(out)


def test_merging_into_a_sliced_base_is_slicing_the_merged_model(base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plan = random_plan(describe(dense.config), ("mlp_channels", "kv_groups", "layers"))
    plan.save(tmp_path / "plan.json")
    slice_model(dense, plan)
    pruned = saved(dense, tmp_path / "pruned")
    for number, options in enumerate(({}, {"delta": "dare", "options": {"drop": 0.5}})):
        whole = merged(tmp_path, [tuned], base, f"whole{number}", **options)
        then_sliced = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        slice_model(then_sliced, plan)
        found = tensors(merged(tmp_path, [tuned], pruned, f"small{number}", plan=tmp_path / "plan.json", **options))
        expected = then_sliced.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    with pytest.raises(PlanMismatchError, match="--plan"):
        merged(tmp_path, [tuned], pruned, "refused")


def test_several_adapters_add_up(base, tmp_path):
    tuned = [adapter(base, tmp_path / f"a{seed}", seed, r=3 + seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    found, before = tensors(merged(tmp_path, tuned, base, weights=weights)), tensors(base)
    apart = [by_peft(base, folder) for folder in tuned]
    for name, tensor in found.items():
        expected = before[name] + sum(weight * (one[name] - before[name]) for weight, one in zip(weights, apart))
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [name for name in HOWS if name not in ("linear", "average")])
def test_every_way_of_merging_runs_and_differs_from_the_sum(how, base, tmp_path):
    tuned = [adapter(base, tmp_path / f"a{seed}", seed) for seed in range(3)]
    found, plain = tensors(merged(tmp_path, tuned, base, "out", how=how)), tensors(merged(tmp_path, tuned, base, "sum"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.isfinite(found[name]).all()
    assert not torch.allclose(found[name], plain[name])


def test_consensus_by_hand():
    one, two, three = (
        torch.tensor([[1.0, -2.0, 0.0]]),
        torch.tensor([[3.0, 1.0, 0.0]]),
        torch.tensor([[-1.0, -1.0, 5.0]]),
    )
    found = combine([one, two, three], [1, 1, 1], consensus=True, normalise=True)
    assert found.tolist() == [[2.0, -1.5, 5.0]]
    found = combine([one, two, three], [1, 1, 2], consensus=True, normalise=False)
    assert found.tolist() == [[4.0, -4.0, 10.0]]
    assert combine([one, two], [1, 3], consensus=False, normalise=True).tolist() == [[2.5, 0.25, 0.0]]
    opposite = combine([one, -one], [1, 1], consensus=True, normalise=True)
    assert torch.isfinite(opposite).all()


def test_a_stopped_merge_goes_on_and_ends_the_same(base, tmp_path, monkeypatch):
    tuned = adapter(base, tmp_path / "adapter")
    settings = MergeSettings(shard_size=20_000)
    expected = tensors(merged(tmp_path, [tuned], base, "expected", settings=settings))
    real, calls = stream_merge.save_file, []

    def fails_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(stream_merge, "save_file", fails_at_the_third)
    with pytest.raises(ExportError, match="the same command goes on"):
        merged(tmp_path, [tuned], base, "out", settings=settings)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(stream_merge, "save_file", lambda *args, **kwargs: (calls.append(args), real(*args, **kwargs)))
    before = len(calls)
    found = tensors(merged(tmp_path, [tuned], base, "out", settings=settings))
    assert len(calls) - before < len(list((tmp_path / "out").glob("*.safetensors"))), "finished shards stay"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.glob(".out*"))


def test_another_merge_does_not_go_on_with_what_is_left(base, tmp_path, monkeypatch):
    tuned = adapter(base, tmp_path / "adapter")
    work = tmp_path / ".out.merging"
    work.mkdir()
    (work / "prunetune_merge.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, work / "model.safetensors")
    assert "x" not in tensors(merged(tmp_path, [tuned], base, "out"))


def test_a_merge_of_other_weights_does_not_go_on(base, tmp_path, monkeypatch):
    """Two tunings of one model have files of one size; the first one's shards must not end in the second's merge."""
    one, two = (saved(tiny_model(seed=seed, tie_word_embeddings=False), tmp_path / f"{seed}" / "m") for seed in (5, 6))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: real(a, b) if "00002" not in str(b) else 1 / 0)
    settings = MergeSettings(shard_size=20_000)
    with pytest.raises(ZeroDivisionError):
        merged(tmp_path, [one], base, "out", settings=settings)
    monkeypatch.undo()
    found, expected = tensors(merged(tmp_path, [two], base, "out", settings=settings)), tensors(two)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_folders_of_one_name_are_two_models(base, tmp_path):
    for number, seed in enumerate((0, 0)):
        adapter(base, tmp_path / f"{number}" / "adapter", seed)
    same = [tmp_path / "0" / "adapter", tmp_path / "1" / "adapter"]
    both = tensors(merged(tmp_path, same, base, "both", delta="dare", options={"drop": 0.5}, weights=[0.5, 0.5]))
    one = tensors(merged(tmp_path, same[:1], base, "one", delta="dare", options={"drop": 0.5}))
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(both[name], one[name]), "their masks are drawn apart"


def test_calibration_on_a_pruned_base_sees_its_own_inputs(base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plan = random_plan(describe(dense.config), ("mlp_channels", "kv_groups", "layers"))
    plan.save(tmp_path / "plan.json")
    slice_model(dense, plan)
    pruned = saved(dense, tmp_path / "pruned")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w5 w9 w2"}) + "\n" for i in range(20)))
    request = {"plan": tmp_path / "plan.json", "calibration": str(rows), "options": {"drop": 0.5}}
    found = tensors(merged(tmp_path, [tuned], pruned, "out", delta="wanda", **request))
    before = tensors(pruned)
    for name in (name for name in found if "down_proj" in name):
        changed = (found[name] != before[name]).sum(1)
        assert (changed == int(0.5 * found[name].shape[1])).all()


def test_calibrated_methods_see_real_inputs(base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w5 w9 w2"}) + "\n" for i in range(20)))
    request = {"calibration": str(rows), "options": {"drop": 0.9}}
    closed = tensors(merged(tmp_path, [tuned], base, "q", delta="darex_q", rescale="closed_form", **request))
    plain = tensors(merged(tmp_path, [tuned], base, "d", delta="dare", options={"drop": 0.9}))
    name, before = "model.layers.0.mlp.down_proj.weight", tensors(base)
    assert torch.equal(closed[name] != before[name], plain[name] != before[name]), "the same entries stay"
    assert (closed[name] - before[name]).norm() < (plain[name] - before[name]).norm()
    merged(tmp_path, [tuned], base, "w", delta="wanda", **request)
    with pytest.raises(ConfigError, match="--calibration"):
        merged(tmp_path, [tuned], base, "refused", delta="wanda")


def test_info_predicts_the_error_of_dropping(base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w5 w9 w2"}) + "\n" for i in range(20)))
    records = delta_info(MergeRequest([tuned], str(base), calibration=str(rows)))
    assert {record["name"] for record in records} == set(by_peft(base, tuned)) & {
        name for name in tensors(base) if "proj" in name
    }
    for record in records:
        assert record["errors"]["90%"] == pytest.approx((9 * record["R"]) ** 0.5)
        assert record["mean_abs"] > 0


def test_bad_input_is_refused_and_nothing_is_left(base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="did you mean"):
        merged(tmp_path, [tuned], base, how="dare_tis")
    with pytest.raises(ConfigError, match="weights for"):
        merged(tmp_path, [tuned], base, weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="drop"):
        merged(tmp_path, [tuned], base, delta="dare", options={"drop": 1.5})
    with pytest.raises(ConfigError, match="vote on signs"):
        merged(tmp_path, [tuned], base, how="ties")
    with pytest.raises(UnsupportedModelError, match="no folder"):
        merged(tmp_path, [tmp_path / "nowhere"], base)
    wrong = saved(tiny_model(hidden_size=96, tie_word_embeddings=False), tmp_path / "wrong")
    with pytest.raises(PlanMismatchError, match="the base it was trained on"):
        merged(tmp_path, [tuned], wrong)
    weights = load_file(tuned / "adapter_model.safetensors")
    first = next(iter(weights))
    bad = tmp_path / "bad"
    shutil.copytree(tuned, bad)
    save_file({**weights, first: weights[first] * float("nan")}, bad / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match="not finite"):
        merged(tmp_path, [bad], base)
    content = (tuned / "adapter_model.safetensors").read_bytes()
    (bad / "adapter_model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UnsupportedModelError, match="truncated"):
        merged(tmp_path, [bad], base)
    assert not (tmp_path / "merged").exists()
    out = merged(tmp_path, [tuned], base)
    with pytest.raises(ExportError, match="exists"):
        merged(tmp_path, [tuned], base)
    merge_run(MergeRequest([tuned], str(base), settings=replace(MergeSettings(), seed=1)), out, overwrite=True)
    assert batch(1, 3)
