"""Speed and memory: forced lengths, alternation, ratios within a turn, a fresh process for the peak."""

from __future__ import annotations

import pytest
import torch

from prunetune.core.errors import PrunetuneError
from prunetune.evaluate import speed
from prunetune.evaluate.memory import peak_memory, peak_resident_bytes
from prunetune.evaluate.speed import METRICS, Spread, compare_speed


class Counting(torch.nn.Module):
    """Notes the (batch, length) of every forward pass and always predicts the end-of-sequence token."""

    def __init__(self, inner, log, name):
        super().__init__()
        self.inner, self.log, self.name = inner, log, name
        self.config, self.device = inner.config, inner.device

    def forward(self, input_ids, **kwargs):
        self.log.append((self.name, *input_ids.shape))
        outputs = self.inner(input_ids=input_ids, **kwargs)
        outputs.logits[..., self.config.eos_token_id] = 1e9
        return outputs


def test_length_is_forced_and_models_take_turns(make_model):
    log = []
    models = {name: Counting(make_model(), log, name) for name in ("a", "b")}
    compare_speed(models, prompt_tokens=6, new_tokens=3, repeats=2, batch_sizes=(2,))
    prefills = [entry for entry in log if entry[2] == 6]
    # One warm-up of each, then back and forth.
    assert [name for name, *_ in prefills] == ["a", "b", "a", "b", "b", "a"]
    # Warm-up decodes 2 steps, each of two turns exactly 3, though every token is end-of-sequence.
    assert len([entry for entry in log if entry == ("a", 2, 1)]) == 2 + 3 + 3


def test_ratios_are_formed_within_a_turn(monkeypatch, make_model):
    """The machine gets ten times slower half way: medians of rates mix that up, the ratio does not."""
    rates = {"first": iter([1, 10, 100, 1000]), "second": iter([1, 20, 200, 2000])}
    models = {name: make_model() for name in rates}
    names = {id(model): name for name, model in models.items()}

    def timed(model, prompt, new_tokens):
        rate = float(next(rates[names[id(model)]]))
        return rate, rate / 2

    monkeypatch.setattr(speed, "_time_once", timed)
    found = compare_speed(models, repeats=3, batch_sizes=(1,))
    assert found["first"].tokens_per_second["prefill_tps_b1"] == Spread(100.0, 55.0, 550.0)
    assert found["second"].ratios["prefill_tps_b1"] == Spread(2.0, 2.0, 2.0)
    assert found["second"].ratios["decode_tps_b1"] == Spread(2.0, 2.0, 2.0)
    assert found["first"].ratios["prefill_tps_b1"].median == 1.0


def test_single_model_gets_every_metric(make_model):
    found = compare_speed({"model": make_model()}, prompt_tokens=8, new_tokens=2, repeats=2)["model"]
    assert set(found.tokens_per_second) == set(METRICS)
    for spread in found.tokens_per_second.values():
        assert 0 < spread.low <= spread.median <= spread.high


def test_decode_continues_the_prompt(make_model):
    """The timed loop computes what greedy generation does: the cache is used and filled rightly."""
    model, seen = make_model(), []
    real = model.forward

    def spy(*args, **kwargs):
        seen.append(kwargs["input_ids"])
        return real(*args, **kwargs)

    model.forward = spy
    prompt = torch.arange(3, 11)[None]
    speed._time_once(model, prompt, 4)
    model.forward = real
    expected = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 8:]
    assert torch.cat(seen[1:], dim=1)[0].tolist() == expected.tolist()


def test_larger_model_has_a_higher_peak_in_its_own_process(make_folder, tmp_path):
    # 3 x 1536 x 3072 x 2 layers in float32: about 113 MB more than the tiny one.
    tiny = peak_memory(make_folder(tmp_path / "tiny"), "float32", prompt_tokens=8)
    wide = peak_memory(
        make_folder(tmp_path / "wide", hidden_size=1536, intermediate_size=3072), "float32", prompt_tokens=8
    )
    assert wide.peak_bytes - tiny.peak_bytes > 100e6
    assert 0 < tiny.idle_bytes <= tiny.peak_bytes < 2e9


def test_peak_memory_says_why_it_failed(tmp_path):
    with pytest.raises(PrunetuneError, match=r"failed with exit status 1: .*evaluate\.speed=false"):
        peak_memory(tmp_path / "nothing", "float32")


def test_own_peak_covers_an_allocation():
    before = peak_resident_bytes()
    block = torch.ones(80_000_000 // 4)
    assert peak_resident_bytes() >= before
    assert peak_resident_bytes() > block.numel() * 4
