"""PEFT merges several adapters by factors or by their products: ours is the same wherever it goes by the products.

Its ``linear``, ``ties``, ``dare_*`` and ``magnitude_prune`` add up factors: what comes out has cross terms B_i A_j and
is no sum of deltas; their ``*_svd`` forms, ``svd`` and ``cat`` go by the products. With rank enough for the sum, the
decomposition at their end changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prunetune.core.streams import lattice
from prunetune.model.deltas import threshold
from tests.export.test_stream_merge import adapter, merged, tensors

NAMES, WEIGHTS = ("a0", "a1", "a2"), [0.5, -0.3, 0.8]
# All of a tiny matrix's directions.
FULL = 48


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> list[Path]:
    return [adapter(base, tmp_path / name, seed) for seed, name in enumerate(NAMES)]


def by_peft(base: Path, tuned: list[Path], kind: str, weights: list[float], **options) -> dict[str, torch.Tensor]:
    """Stock name -> weight of what PEFT makes of them."""
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(dense, tuned[0], adapter_name=NAMES[0])
    for folder in tuned[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    if kind == "cat":
        model.add_weighted_adapter(list(NAMES), weights, "sum", combination_type=kind)
    else:
        options = {"svd_rank": FULL, "svd_full_matrices": False, **options}
        model.add_weighted_adapter(list(NAMES), weights, "sum", combination_type=kind, **options)
    model.set_adapter("sum")
    return model.merge_and_unload(adapter_names=["sum"]).state_dict()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert changed == [name for name in found if "proj" in name]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_sums_of_products(kind: str, base: Path, tuned: list[Path], tmp_path: Path) -> None:
    found = tensors(merged(tmp_path, tuned, base, weights=WEIGHTS))
    same(found, by_peft(base, tuned, kind, WEIGHTS), tensors(base))
    again = merged(tmp_path, tuned, base, "joined", weights=WEIGHTS, output="adapter")
    same(tensors(merged(tmp_path, [again], base, "once more")), found, tensors(base))


@pytest.mark.parametrize("drop", [0.5, 0.81])
def test_the_largest_of_products(drop: float, base: Path, tuned: list[Path], tmp_path: Path) -> None:
    request = {"delta": "magnitude", "options": {"drop": drop}}
    found = tensors(merged(tmp_path, tuned, base, weights=WEIGHTS, **request))
    same(found, by_peft(base, tuned, "magnitude_prune_svd", WEIGHTS, density=round(1 - drop, 2)), tensors(base))
    # TIES: PEFT elects before it weighs and divides by the number of models; equal weights of 1 are all the same.
    found = tensors(merged(tmp_path, tuned, base, "ties", how="ties", options={"drop": drop}))
    same(found, by_peft(base, tuned, "ties_svd", [1.0, 1.0, 1.0], density=round(1 - drop, 2)), tensors(base))


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_random_dropping_of_products(
    how: str, base: Path, tuned: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PEFT's coins falling as ours do; it asks for them matrix by matrix, and in it adapter by adapter."""
    before, keep, weights = tensors(base), 0.5, WEIGHTS if how == "dare_linear" else [1.0] * 3
    names = [name for name in AutoModelForCausalLM.from_pretrained(base).state_dict() if "proj" in name]
    asked = [(name, model) for name in names for model in NAMES]

    def coins(chances: torch.Tensor) -> torch.Tensor:
        name, model = asked.pop(0)
        rows, columns = before[name].shape
        assert chances.shape == (rows, columns)
        words = lattice(0, "dare", model, name, rows=slice(0, rows), columns=columns)
        return torch.from_numpy(words < threshold(keep)).float()

    monkeypatch.setattr(torch, "bernoulli", coins)
    expected = by_peft(base, tuned, f"{how}_svd", weights, density=keep)
    assert not asked
    found = tensors(merged(tmp_path, tuned, base, how=how, weights=weights, options={"drop": 1 - keep}))
    if how == "dare_ties":
        # PEFT divides by the number of models that agree, and mergekit, as we, does not.
        counted = merged(tmp_path, tuned, base, "counted", how="ties", delta="dare", options={"drop": 1 - keep})
        assert not torch.allclose(found[names[0]], expected[names[0]])
        found = tensors(counted)
    same(found, expected, before)


def test_factors_added_up_have_cross_terms(base: Path, tuned: list[Path], tmp_path: Path) -> None:
    ours, name = tensors(merged(tmp_path, tuned, base)), "model.layers.0.mlp.down_proj.weight"
    theirs = by_peft(base, tuned, "linear", [1.0, 1.0, 1.0], svd_rank=None)
    change = (ours[name] - tensors(base)[name]).norm()
    assert float((theirs[name] - ours[name]).norm() / change) > 0.5
