"""Adapters of other ranks: scales stay, new ranks do nothing, and stock PEFT reads what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from prunetune.core.errors import PlanMismatchError
from prunetune.model.ranks import RankChange, Ranks
from prunetune.model.surgery import base_model, slice_model
from tests.support import batch, logits, random_plan, tiny_arch, tiny_model

UP, Q, DOWN = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
DECIDED = {UP: RankChange((0, 2)), Q: RankChange((1,), 5), DOWN: RankChange(())}


def sliced(**options: Any) -> Any:
    """A sliced tiny model with adapters of whole numbers, whose products are exact in any order."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(), LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options})
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randint(-2, 3, parameter.shape).float()
    slice_model(model, random_plan(tiny_arch(), ("mlp_channels", "kv_groups", "layers")))
    return model.eval()


def layers(model: Any) -> dict[str, Any]:
    return {path: layer for path, layer in base_model(model).named_modules() if isinstance(layer, LoraLayer)}


def scaled(layer: Any, kept: tuple[int, ...] | None = None) -> torch.Tensor:
    """What an adapter adds to its linear, with some of its ranks."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    index = torch.arange(len(a)) if kept is None else torch.tensor(kept, dtype=torch.long)
    return float(layer.scaling["default"]) * (b[:, index] @ a[index])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_every_adapter_is_that_of_its_ranks_that_stay_at_the_old_scale(options: dict[str, Any]) -> None:
    model = sliced(**options)
    wanted = {
        path: scaled(layer, DECIDED[path].kept if path in DECIDED else None) for path, layer in layers(model).items()
    }
    ranks = Ranks.of(model, DECIDED, seed=0)
    ranks.change(model)
    assert not isinstance(base_model(model).get_submodule(DOWN), LoraLayer)
    for path, layer in layers(model).items():
        torch.testing.assert_close(scaled(layer), wanted[path], rtol=1e-6, atol=1e-6)
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"] == ranks.changes[path].rank
        assert layer.lora_A["default"].weight.requires_grad
    assert {path: layer.r["default"] for path, layer in layers(model).items()}[Q] == 6
    assert str(ranks) == "13 of 14 adapters stay, of rank 2 to 6"


def test_growing_changes_nothing_and_is_drawn_from_the_seed_and_the_path() -> None:
    grown = {Q: RankChange((0, 1, 2), 4), UP: RankChange((0, 1, 2), 4)}
    model, same, other = sliced(), sliced(), sliced()
    before, inputs = {path: scaled(layer) for path, layer in layers(model).items()}, batch()
    wanted = logits(model.double(), inputs)
    model.float()
    for each, seed in ((model, 7), (same, 7), (other, 8)):
        Ranks.of(each, grown, seed).change(each)
    for path, layer in layers(model).items():
        assert torch.equal(scaled(layer), before[path])
    torch.testing.assert_close(logits(model.double(), inputs), wanted, rtol=0, atol=1e-6)
    model.float()

    def new(model: Any, path: str) -> torch.Tensor:
        layer = layers(model)[path]
        assert not layer.lora_B["default"].weight[:, 3:].any()
        return layer.lora_A["default"].weight[3:]

    assert torch.equal(new(model, Q), new(same, Q))
    assert not torch.equal(new(model, Q), new(other, Q))
    assert not torch.equal(new(model, Q)[:, :8], new(model, UP)[:, :8])
    # PEFT's own draw: uniform, of width 1 / sqrt(inputs).
    assert 0.8 / 48**0.5 < float(new(model, Q).detach().abs().max()) <= 1 / 48**0.5


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 7}, "exclude_modules": ["lm_head"]},
        {"target_modules": ["lm_head", "embed_tokens", "q_proj", "up_proj", "down_proj"]},
        {"exclude_modules": r".*\.0\.self_attn\.[kv]_proj"},
    ],
    ids=["rslora", "patterns", "beside", "expression"],
)
def test_stock_peft_reads_the_saved_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    """What the user wrote by parts of names, or by numbers of layers of which one has left, must not win over ours."""
    model, decided = sliced(**options), {UP: RankChange((0, 2)), Q: RankChange((1,), 5), DOWN: RankChange(())}
    Ranks.of(model, decided, seed=0).change(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    base = tiny_model()
    slice_model(base, random_plan(tiny_arch(), ("mlp_channels", "kv_groups", "layers")))
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=0)
    assert layers(again).keys() == layers(model).keys()
    assert all(layer.r == layers(model)[path].r for path, layer in layers(again).items())


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    ranks = Ranks({DOWN: RankChange(()), UP: RankChange((0, 3), 1, 1 / 3)}, 5)
    ranks.save(tmp_path / "ranks.json")
    assert Ranks.load(tmp_path / "ranks.json") == ranks


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"seed": 1}',
        '{"seed": 1, "changes": {"x": {"kept": [-1]}}}',
        '{"seed": 1, "changes": {"x": {"kept": ["0"]}}}',
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ranks.json").write_text(text)
    with pytest.raises(PlanMismatchError, match=r"ranks\.json"):
        Ranks.load(tmp_path / "ranks.json")


@pytest.mark.parametrize("changes", [{}, {UP: RankChange((0, 99))}], ids=["none", "beyond"])
def test_ranks_of_other_adapters_are_refused(changes: dict[str, RankChange]) -> None:
    with pytest.raises(PlanMismatchError, match="do not fit"):
        Ranks(changes, 0).change(sliced(target_modules=["up_proj"]))


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_names_of_the_model_and_of_the_file_mean_the_same(prefix: str) -> None:
    ranks, factor = Ranks({DOWN: RankChange(()), UP: RankChange((1,), 1)}, 0), torch.arange(6.0).reshape(2, 3)
    for end in ("lora_A.weight", "lora_A.default.weight"):
        assert ranks.leaves(f"{prefix}{DOWN}.{end}")
        assert ranks.resize(f"{prefix}{UP}.{end}", factor).tolist() == [[3, 4, 5], [0, 0, 0]]
    assert ranks.resize(f"{prefix}{UP}.lora_B.weight", factor.T).tolist() == [[3, 0], [4, 0], [5, 0]]
    for other in ("model.layers.9.mlp.up_proj.lora_A.weight", "model.norm.weight", f"{UP}.base_layer.weight"):
        assert not ranks.leaves(prefix + other)
        assert ranks.resize(prefix + other, factor) is factor
