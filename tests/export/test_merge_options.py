"""Options of merging: q found on rows, weights and methods by tensor, one ranking of all tensors, the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prunetune.core.errors import ConfigError, DataError
from prunetune.methods.deltas import build_delta
from prunetune.pipeline.delta_search import search
from prunetune.pipeline.merge_request import MergeRequest, Rule, parse_rule
from tests.export.test_stream_merge import adapter, merged, saved, tensors
from tests.support import tiny_model

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w5 w9 w2"}) + "\n" for i in range(20)))
    return str(path)


def facts(folder: Path) -> dict:
    return json.loads((folder / "prunetune_merge.json").read_text())


def kept(found, before) -> float:
    return float((found != before).float().mean())


def test_a_search_finds_the_minimum_and_stops_early():
    tried = []

    def score(options):
        tried.append(options["q"])
        return (options["q"] - 0.03) ** 2

    found = search("darex_q", {"drop": 0.99, "q": "search"}, score)
    assert found.option == "q"
    assert found.options["q"] == pytest.approx(0.03, abs=0.006)
    assert max(tried) < 0.5
    assert len(tried) < 9
    assert search("darex_q", {"q": 0.5}, score).options == {"q": 0.5}
    held = search("darex_q", {"drop": 0.9, "q": "auto"}, lambda options: abs(options["multiplier"] - 1.9))
    least = search("darex_q", {"drop": 0.9, "q": "auto"}, lambda options: options["multiplier"])
    assert least.options["multiplier"] == 0, "dare itself is among what is tried"
    assert held.options == {"drop": 0.9, "q": "closed_form", "multiplier": pytest.approx(2.0, rel=0.2)}


@pytest.mark.parametrize("rescale", ["auto", "search", "analytic", "closed_form"])
@pytest.mark.parametrize("by", ["loss", "outputs"])
def test_q_is_found_on_rows(rescale, by, base, tmp_path, rows):
    if rescale == "closed_form" and by == "outputs":
        return  # nothing is searched
    tuned = adapter(base, tmp_path / "adapter")
    request = {"delta": "dare", "options": {"drop": 0.9}, "calibration": rows, "by": by}
    out = merged(tmp_path, [tuned], base, rescale=rescale, **request)
    chosen = facts(out)["delta"]
    assert chosen["method"] == "darex_q"
    option = {"auto": "multiplier", "search": "q", "analytic": "eta", "closed_form": "q"}[rescale]
    assert isinstance(chosen[option], float) or rescale == "closed_form"
    plain, before = (
        tensors(merged(tmp_path, [tuned], base, "plain", delta="dare", options={"drop": 0.9})),
        tensors(base),
    )
    found = tensors(out)
    assert torch.equal(found[NAME] != before[NAME], plain[NAME] != before[NAME]), "the same entries stay"
    assert (found[NAME] - before[NAME]).norm() <= (plain[NAME] - before[NAME]).norm() * 1.0001
    recorded = {key: value for key, value in chosen.items() if key != "method"}
    again = merged(tmp_path, [tuned], base, "again", delta="darex_q", options=recorded, calibration=rows)
    assert torch.equal(tensors(again)[NAME], found[NAME]), "what is recorded makes the same merge"


def test_rescale_takes_numbers_and_words_without_rows(base, tmp_path):
    tuned, before = adapter(base, tmp_path / "adapter"), tensors(base)
    sizes = {}
    for rescale in (".1", "0.5", "none", "inverse_keep", "auto", "l1"):
        out = merged(tmp_path, [tuned], base, rescale, delta="dare", options={"drop": "90%"}, rescale=rescale)
        sizes[rescale] = float((tensors(out)[NAME] - before[NAME]).norm())
    assert sizes[".1"] == pytest.approx(sizes["inverse_keep"], rel=1e-3)
    assert sizes["auto"] == sizes["inverse_keep"]
    assert sizes["none"] == pytest.approx(0.1 * sizes[".1"], rel=1e-3)
    assert sizes["0.5"] == pytest.approx(0.2 * sizes[".1"], rel=1e-3)
    assert sizes["l1"] == pytest.approx(sizes[".1"], rel=0.3)
    for wrong, said in (("closed", "closed_form"), ("search", "--calibration")):
        with pytest.raises(ConfigError, match=said):
            merged(tmp_path, [tuned], base, "x", delta="dare", options={"drop": 0.5}, rescale=wrong)
    with pytest.raises(ConfigError, match="does not drop by lot"):
        merged(tmp_path, [tuned], base, "x", delta="magnitude", rescale="0.5")


def test_weights_and_methods_by_tensor(base, tmp_path):
    tuned = [adapter(base, tmp_path / f"a{seed}", seed) for seed in range(2)]
    rules = [
        parse_rule(r"mlp\.down_proj: weights=1,0"),
        parse_rule("q_proj: drop=90%"),
        parse_rule("k_proj: delta=identity"),
    ]
    out = merged(tmp_path, tuned, base, how="dare_linear", weights=[0.5, 0.5], rules=rules)
    found, before = tensors(out), tensors(base)
    alone = tensors(merged(tmp_path, tuned[:1], base, "one", how="dare_linear"))
    plain = tensors(merged(tmp_path, tuned, base, "sum", weights=[0.5, 0.5]))
    assert torch.equal(found[NAME], alone[NAME])
    share = {
        part: kept(found[f"model.layers.1.{part}.weight"], before[f"model.layers.1.{part}.weight"]) for part in PARTS
    }
    assert share["self_attn.q_proj"] == pytest.approx(1 - 0.9**2, abs=0.03)
    assert share["self_attn.v_proj"] == pytest.approx(0.75, abs=0.03)
    name = "model.layers.1.self_attn.k_proj.weight"
    torch.testing.assert_close(found[name], plain[name], atol=1e-7, rtol=1e-6)
    assert facts(out)["rules"][0]["weights"] == [1.0, 0.0]


PARTS = ("self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mlp", "not of the form"),
        ("mlp: drop", "not KEY=VALUE"),
        ("[: drop=1", "no regular expression"),
        ("mlp: weights=a", "list of numbers"),
        ("mlp: delta=dar", "did you mean"),
    ],
)
def test_rules_are_checked_when_they_are_read(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_rule(text)


def test_rules_are_checked_against_the_merge(base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    for rule, said in ((Rule("a", [1, 2]), "2 weights for 1"), (Rule("a", options={"dorp": 1}), "no such option")):
        with pytest.raises(ConfigError, match=said):
            merged(tmp_path, [tuned], base, "x", delta="dare", rules=[rule])
    assert MergeRequest([tuned], "b", rules=[Rule("a", options={"drop": 0.2})]).problems()


def test_trimming_over_the_whole_model(base, tmp_path):
    tuned = [adapter(base, tmp_path / f"a{seed}", seed) for seed in range(2)]
    before = tensors(base)
    options = {"drop": 0.9, "scope": "model"}
    found = tensors(merged(tmp_path, tuned[:1], base, "one", delta="magnitude", options=options))
    whole = tensors(merged(tmp_path, tuned[:1], base, "whole"))
    changed = [name for name in whole if not torch.equal(whole[name], before[name])]
    everything = torch.cat([(whole[name] - before[name]).flatten().abs() for name in changed])
    left = torch.cat([(found[name] != before[name]).flatten() for name in changed])
    assert int(left.sum()) == pytest.approx(0.1 * left.numel(), rel=0.01)
    assert float(everything[left].min()) >= float(everything[~left].max()) - 1e-6
    shares = {name: kept(found[name], before[name]) for name in changed}
    assert max(shares.values()) > 2 * min(shares.values()), "tensors with larger changes keep more"
    merged(tmp_path, tuned, base, "ties", how="ties", options={"scope": "model"})


def test_large_changes_are_not_dropped_by_lot(base, tmp_path):
    tuned = saved(tiny_model(seed=5, tie_word_embeddings=False), tmp_path / "tuned")
    with pytest.raises(DataError, match=r"1\.\de-01.*--delta magnitude.*--allow-large") as refused:
        merged(tmp_path, [tuned], base, delta="dare", options={"drop": 0.9})
    assert "90%" in str(refused.value)
    for number, request in enumerate(
        (
            {"delta": "dare", "options": {"drop": 0.5}},
            {"delta": "magnitude", "options": {"drop": 0.9}},
            {"delta": "dare", "options": {"drop": 0.9}, "allow_large": True},
        )
    ):
        merged(tmp_path, [tuned], base, f"allowed{number}", **request)
    assert build_delta("dare", {}).random
