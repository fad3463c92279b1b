"""Merging whole models, and what no factor describes: norms, heads, new vocabulary, routers, sparse bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prunetune.core.errors import ConfigError, DataError, ExportError, PlanMismatchError, UnsupportedModelError
from prunetune.export.merge_source import Source
from prunetune.export.stream_merge import MergeSettings
from prunetune.methods.deltas import build_delta
from prunetune.model.shards import ShardReader
from tests.export.test_stream_merge import CONFIGS, adapter, by_peft, merged, saved, tensors
from tests.support import tiny_model

NORM, HEAD, NAME = "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"


def tuned_model(base: Path, folder: Path, seed: int, scale: float = 1e-3) -> Path:
    """The base with every weight a little changed."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return saved(model, folder)


@pytest.mark.parametrize("how", ["linear", "average", "dare_linear"])
def test_norms_add_up_unpruned(how: str, base: Path, tmp_path: Path) -> None:
    folders = [tuned_model(base, tmp_path / f"t{seed}", seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.4]
    found, before = tensors(merged(tmp_path, folders, base, how=how, weights=weights)), tensors(base)[NORM]
    expected = before + sum(weight * (tensors(folder)[NORM] - before) for weight, folder in zip(weights, folders))
    if how == "average":
        expected = before + (expected - before) / sum(weights)
    torch.testing.assert_close(found[NORM], expected, atol=3e-7, rtol=0)
    half = tensors(merged(tmp_path, folders[:1], base, "half", settings=MergeSettings(scale=0.5)))[NORM]
    torch.testing.assert_close(half, (before + tensors(folders[0])[NORM]) / 2, atol=1e-7, rtol=0)


def test_heads_that_were_trained_whole_add_up_in_the_bases_dtype(base: Path, tmp_path: Path) -> None:
    folders = [adapter(base, tmp_path / f"a{seed}", seed, **CONFIGS["saved whole"]) for seed in range(2)]
    found, before = tensors(merged(tmp_path, folders, base, weights=[0.5, 0.25])), tensors(base)[HEAD]
    one, two = (by_peft(base, folder)[HEAD] for folder in folders)
    torch.testing.assert_close(found[HEAD], before + 0.5 * (one - before) + 0.25 * (two - before), atol=1e-6, rtol=0)
    half = saved(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), tmp_path / "half")
    out = ShardReader(merged(tmp_path, folders[:1], half, "out"))
    assert {entry.dtype for entry in out.entries.values()} == {"BF16"}


def test_new_vocabulary_is_taken_as_it_is(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    bigger = saved(model, tmp_path / "bigger")
    out = merged(tmp_path, [bigger], base, delta="dare", options={"drop": 0.9})
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows + 2
    for name in ("model.embed_tokens.weight", HEAD):
        assert torch.equal(tensors(out)[name], tensors(bigger)[name])
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.get_output_embeddings().weight.shape[0] == rows + 2


def spoilt(base: Path, folder: Path, change: Any) -> Path:
    """A copy of the base with other tensors."""
    saved(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_is_not_the_bases_is_refused(base: Path, tmp_path: Path) -> None:
    less = spoilt(base, tmp_path / "less", lambda content: content.pop(NAME))
    more = spoilt(base, tmp_path / "more", lambda content: content.update(extra=torch.zeros(2, 2)))
    other = spoilt(base, tmp_path / "other", lambda content: content.update({NAME: content[NAME][:, :-1].clone()}))
    for folder, kind, said in (
        (less, UnsupportedModelError, f"lacks {NAME}"),
        (more, UnsupportedModelError, "has extra, which"),
        (other, PlanMismatchError, "is this the base"),
    ):
        with pytest.raises(kind, match=said):
            merged(tmp_path, [folder], base)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", [NAME, NORM])
def test_numbers_that_are_not_finite_are_refused(name: str, base: Path, tmp_path: Path) -> None:
    def spoil(content: dict[str, torch.Tensor]) -> None:
        content[name] = content[name] * torch.nan

    with pytest.raises(ExportError, match=f"{name}: the merged weights are not finite"):
        merged(tmp_path, [spoilt(base, tmp_path / "nan", spoil)], base)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_zeros_of_a_sparse_base_stay_or_are_filled_but_never_in_silence(kind: str, base: Path, tmp_path: Path) -> None:
    def halve(content: dict[str, torch.Tensor]) -> None:
        for name in (name for name in content if "proj" in name):
            content[name] = content[name] * (content[name].abs() > content[name].abs().median())

    sparse = spoilt(base, tmp_path / "sparse", halve)
    tuned = adapter(base, tmp_path / "a") if kind == "adapter" else tuned_model(sparse, tmp_path / "t", 1)
    with pytest.raises(DataError, match=r"[45]\d% of .* is 0, and [67]\d% of the change .*--keep-zeros.*--fill-zeros"):
        merged(tmp_path, [tuned], sparse)
    request = {"delta": "dare", "options": {"drop": 0.5}}
    kept = tensors(merged(tmp_path, [tuned], sparse, "kept", settings=MergeSettings(keep_zeros=True), **request))
    filled = tensors(merged(tmp_path, [tuned], sparse, "filled", settings=MergeSettings(keep_zeros=False), **request))
    for name, before in tensors(sparse).items():
        if "proj" in name:
            assert torch.equal(kept[name] == 0, before == 0), "as sparse as before"
            assert torch.equal(kept[name], filled[name] * (before != 0))
            assert not torch.equal(kept[name], before)
    with pytest.raises(ConfigError, match="--keep-zeros"):
        merged(tmp_path, [tuned], sparse, output="adapter", settings=MergeSettings(keep_zeros=True))


def test_routers_lose_nothing_unless_it_is_said() -> None:
    source = Source(None, 1.0, build_delta("dare", {}), "a")  # type: ignore[arg-type]
    assert source.method_of("model.layers.0.mlp.gate.weight") is None
    assert source.method_of("model.layers.0.block_sparse_moe.router.weight") is None
    assert source.method_of("model.layers.0.mlp.gate_proj.weight") is source.method


def test_transposed_linears(tmp_path: Path) -> None:
    """GPT-2 stores its linears the other way round, and says so in the adapter."""
    torch.manual_seed(0)
    base = saved(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99)), tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "a")
    expected, found = by_peft(base, tmp_path / "a"), tensors(merged(tmp_path, [tmp_path / "a"], base))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name if name in expected else f"transformer.{name}"])


def test_factors_and_their_product_lose_the_same(base: Path, tmp_path: Path) -> None:
    tuned = adapter(base, tmp_path / "same")
    dense = saved(tiny_model(tie_word_embeddings=False), tmp_path / "dense" / "same")
    save_file(tensors(merged(tmp_path, [tuned], base, "whole")), dense / "model.safetensors", metadata={"format": "pt"})
    request = {"delta": "dare", "options": {"drop": 0.7}, "allow_large": True}
    factors, product = (tensors(merged(tmp_path, [f], base, f"{f.parent.name}-out", **request)) for f in (tuned, dense))
    for name in factors:
        torch.testing.assert_close(factors[name], product[name], atol=2e-6, rtol=1e-5)
