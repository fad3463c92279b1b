"""Merging into a base that the adapter saw quantised: the numbers are bitsandbytes' own, the distance is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prunetune.core.errors import ConfigError, ExportError, UnsupportedModelError
from prunetune.export import merge_base
from prunetune.model.quantized import quantized_linears, weight_of
from prunetune.model.quantized_base import DequantizedReader, RoundedReader, quantized_names, stored_kind
from prunetune.model.shards import ShardReader
from tests.export.test_stream_merge import adapter, merged, saved, tensors
from tests.support import logits, tiny_model

pytest.importorskip("bitsandbytes")

# A width that is a multiple of the quantisation block, which bitsandbytes needs on a CPU.
WIDE = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": False}
CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide tiny model, and a small adapter for it."""
    folder = tmp_path_factory.mktemp("quantized")
    saved(tiny_model(**WIDE), folder / "base")
    adapter(folder / "base", folder / "adapter")
    return folder


def loaded(root: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(root / "base", quantization_config=CONFIGS[kind], dtype=torch.float32)


def stored(root: Path, kind: str) -> Path:
    if not (root / kind).exists():
        loaded(root, kind).save_pretrained(root / kind)
    return root / kind


@pytest.mark.parametrize("kind", CONFIGS)
def test_numbers_are_those_that_the_linears_act_with(kind: str, root: Path) -> None:
    linears = quantized_linears(loaded(root, kind))
    config = json.loads((root / "base/config.json").read_text())
    on_loading = RoundedReader(root / "base", config, kind)
    on_disk = DequantizedReader(stored(root, kind))
    assert stored_kind(json.loads((root / kind / "config.json").read_text())) == kind
    assert {f"{name}.weight" for name in linears} == set(quantized_names(config))
    assert sorted(on_disk.names()) == sorted(on_loading.names()) == sorted(ShardReader(root / "base").names())
    for name, linear in linears.items():
        wanted = weight_of(linear)
        for reader in (on_loading, on_disk):
            assert torch.equal(reader.read(f"{name}.weight"), wanted)
            assert torch.equal(reader.rows(f"{name}.weight", 3, 9), wanted[3:9])
            assert reader.entries[f"{name}.weight"].shape == wanted.shape
    assert torch.equal(on_disk.read("model.norm.weight").float(), on_loading.read("model.norm.weight").float())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("where", ["loaded", "stored"])
def test_the_default_is_what_was_trained(kind: str, where: str, root: Path, tmp_path: Path) -> None:
    base, said = (root / "base", {"quantized": kind}) if where == "loaded" else (stored(root, kind), {})
    out = merged(tmp_path, [root / "adapter"], base, **said)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert ShardReader(out).entries[NAME].dtype == "BF16"
    facts = json.loads((out / "prunetune_merge.json").read_text())
    assert facts["difference"]["kl"] < 0.01
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    trained = PeftModel.from_pretrained(loaded(root, kind), root / "adapter").eval()
    linear = trained.get_base_model().get_submodule(NAME.removesuffix(".weight"))
    wanted = weight_of(linear.base_layer) + linear.get_delta_weight("default").detach()
    torch.testing.assert_close(plain.get_parameter(NAME), wanted, atol=4e-3, rtol=8e-3)


def test_original_and_codes_are_further_away_and_it_is_said(root: Path, tmp_path: Path) -> None:
    differences = {}
    for onto in ("dequantized", "original", "requantized"):
        out = merged(tmp_path, [root / "adapter"], root / "base", onto, quantized="nf4", onto=onto)
        differences[onto] = json.loads((out / "prunetune_merge.json").read_text())["difference"]["kl"]
    assert differences["dequantized"] < differences["original"]
    assert differences["dequantized"] < differences["requantized"]
    plain = tensors(merged(tmp_path, [root / "adapter"], root / "base", "plain"))
    found = tensors(tmp_path / "original")
    torch.testing.assert_close(found[NAME].float(), plain[NAME], atol=4e-3, rtol=8e-3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "requantized")
    assert NAME.removesuffix(".weight") in quantized_linears(again)
    assert torch.isfinite(logits(again.eval())).all()


def test_too_far_away_is_refused_and_nothing_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_base, "TOLERANCE", 1e-9)
    for onto in ("original", "requantized"):
        with pytest.raises(ExportError, match="nats a token away"):
            merged(tmp_path, [root / "adapter"], root / "base", quantized="nf4", onto=onto)
    assert not list(tmp_path.iterdir())


def test_what_contradicts_itself_is_said(root: Path, tmp_path: Path) -> None:
    for base, request, said in (
        (root / "base", {"quantized": "nf3"}, "nf4"),
        (root / "base", {"onto": "original"}, "--quantized"),
        (stored(root, "nf4"), {"quantized": "int8"}, "holds nf4 codes"),
        (stored(root, "nf4"), {"onto": "original"}, "name the original"),
    ):
        with pytest.raises(ConfigError, match=said):
            merged(tmp_path, [root / "adapter"], base, **request)
    with pytest.raises(UnsupportedModelError, match="gptq"):
        stored_kind({"quantization_config": {"quant_method": "gptq"}})
