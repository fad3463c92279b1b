"""Merges that stay adapters: what PEFT loads computes what merging into the base does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prunetune.core.errors import ConfigError, ExportError, UnsupportedModelError
from prunetune.model.tuned import Adapter
from tests.export.test_stream_merge import CONFIGS, adapter, by_peft, merged, saved, tensors
from tests.support import logits, tiny_model


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [name for name in CONFIGS if name != "dora"])
def test_one_adapter_comes_through_unchanged(kind, base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter", **CONFIGS[kind])
    out = merged(tmp_path, [tuned], base, output="adapter")
    close(by_peft(base, out), by_peft(base, tuned))


def test_adapters_of_other_ranks_and_scales_are_joined_exactly(base, tmp_path):
    tuned = [
        adapter(base, tmp_path / "a", 0, r=3),
        adapter(base, tmp_path / "b", 1, r=5, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        adapter(base, tmp_path / "c", 2, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 31}),
    ]
    weights = [0.5, -0.3, 0.2]
    out = merged(tmp_path, tuned, base, "joined", output="adapter", weights=weights)
    close(by_peft(base, out), tensors(merged(tmp_path, tuned, base, "model", weights=weights)))
    found = Adapter(out)
    assert found.config["r"] == 3 + 5 + 4
    assert found.factors("model.layers.0.self_attn.q_proj")[0].shape[0] == 3 + 5 + 2
    assert found.factors("model.layers.0.self_attn.v_proj")[0].shape[0] == 3 + 4
    average = merged(tmp_path, tuned, base, "average", output="adapter", how="average", weights=[2, 1, 1])
    close(by_peft(base, average), tensors(merged(tmp_path, tuned, base, "mean", how="average", weights=[2, 1, 1])))


def test_the_joined_adapter_is_truncated_by_energy(base, tmp_path):
    tuned = [adapter(base, tmp_path / f"a{seed}", seed) for seed in range(2)]
    exact = merged(tmp_path, tuned, base, "exact", output="adapter", delta="rank", options={"energy": 1.0})
    close(by_peft(base, exact), tensors(merged(tmp_path, tuned, base, "sum")))
    short = merged(tmp_path, tuned, base, "short", output="adapter", delta="rank", options={"energy": 0.7})
    assert Adapter(short).config["r"] < Adapter(exact).config["r"] == 8
    before, whole, cut = tensors(base), by_peft(base, exact), by_peft(base, short)
    name = "model.layers.0.mlp.down_proj.weight"
    lost = (cut[name] - whole[name]).square().sum() / (whole[name] - before[name]).square().sum()
    assert 0 < lost <= 0.3


@pytest.mark.parametrize("delta", ["dare", "structural"])
def test_dropping_from_a_alone_keeps_the_adapter_and_its_mask(delta, base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    out = merged(tmp_path, [tuned], base, "out", output="adapter", delta=delta, options={"drop": 0.5})
    before, found = Adapter(tuned), Adapter(out)
    for module in found.modules:
        (whole_a, whole_b), (a, b) = before.factors(module), found.factors(module)
        kept = a != 0
        assert 0.2 < float(kept.float().mean()) < 0.8
        torch.testing.assert_close(a, whole_a * kept * 2, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(b, whole_b * before.scale(module))
    again = merged(tmp_path, [tuned], base, "again", output="adapter", delta=delta, options={"drop": 0.5})
    content = "adapter_model.safetensors"
    assert (again / content).read_bytes() == (out / content).read_bytes()


def test_the_loaded_adapter_computes_what_the_merged_model_does(base, tmp_path):
    tuned = [adapter(base, tmp_path / f"a{seed}", seed) for seed in range(2)]
    out = merged(tmp_path, tuned, base, "adapter", output="adapter")
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(dense, out)
    plain = AutoModelForCausalLM.from_pretrained(merged(tmp_path, tuned, base, "model"), dtype=torch.float32)
    torch.testing.assert_close(logits(with_adapter.eval()), logits(plain.eval()), atol=1e-3, rtol=1e-4)


def test_what_cannot_stay_an_adapter_is_refused(base, tmp_path):
    plain, dora = adapter(base, tmp_path / "plain"), adapter(base, tmp_path / "dora", 1, use_dora=True)
    with pytest.raises(ConfigError, match="no product of factors"):
        merged(tmp_path, [plain, dora], base, how="ties", output="adapter")
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        merged(tmp_path, [plain, dora], base, output="adapter")
    with pytest.raises(ExportError, match="magnitude leaves"):
        merged(tmp_path, [plain], base, output="adapter", delta="magnitude", options={"drop": 0.5})
    tuned = saved(tiny_model(seed=5, tie_word_embeddings=False), tmp_path / "tuned")
    with pytest.raises(UnsupportedModelError, match="only adapters"):
        merged(tmp_path, [tuned], base, output="adapter")
    both = [adapter(base, tmp_path / f"s{seed}", seed, **CONFIGS["saved whole"]) for seed in range(2)]
    with pytest.raises(UnsupportedModelError, match="modules_to_save"):
        merged(tmp_path, both, base, output="adapter")
    assert not (tmp_path / "merged").exists()
    out = merged(tmp_path, [plain], base, output="adapter")
    assert json.loads((Path(out) / "prunetune_merge.json").read_text())["how"] == "linear"
    with pytest.raises(ExportError, match="exists"):
        merged(tmp_path, [plain], base, output="adapter")
