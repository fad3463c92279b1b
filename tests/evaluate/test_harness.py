"""The harness on tiny folders: counts, perplexities, files; the dtype that is chosen."""

from __future__ import annotations

import json

import pytest

from prunetune.core.errors import DataError
from prunetune.evaluate import device as device_module
from prunetune.evaluate.device import cpu_has_bf16, default_dtype
from prunetune.evaluate.harness import EvalSettings, compare, save_evaluation
from prunetune.evaluate.perplexity import domain_perplexity, text_perplexity

SETTINGS = EvalSettings(
    general_tokens=60,
    window=30,
    dtype="float32",
    device="cpu",
    prompt_tokens=8,
    new_tokens=2,
    repeats=2,
)
ROWS = [
    {"prompt": "What is cut?", "completion": " What can be spared."},
    {"prompt": "And?", "completion": " More."},
]


@pytest.fixture(scope="module")
def folders(make_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "base": make_folder(root / "base"),
        "compact": make_folder(root / "compact", seed=1, intermediate_size=32, num_key_value_heads=2),
    }


@pytest.fixture(scope="module")
def results(folders, sentences):
    return compare(folders, ROWS, " ".join(sentences), settings=SETTINGS)


def test_sizes_are_those_of_the_loaded_model(results, make_model):
    for result, width in zip(results, (64, 32)):
        model = make_model(intermediate_size=width)
        linears = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
        assert result.numbers["params_total"] == model.num_parameters()
        assert result.numbers["params_decoder"] == linears
        assert result.numbers["weight_bytes_bf16"] == 2 * model.num_parameters()
        # float32 on disk, and a header of a few kilobytes.
        assert 0 <= result.numbers["weight_bytes"] - 4 * model.num_parameters() < 8192
    assert results[1].numbers["flops_per_token"] < results[0].numbers["flops_per_token"]


def test_perplexities_are_those_of_the_functions(results, make_model, tokenizer, sentences):
    model, numbers = make_model(), results[0].numbers
    domain = domain_perplexity(model, tokenizer, ROWS)
    general = text_perplexity(model, tokenizer, " ".join(sentences), 60, 30)
    assert numbers["domain_ppl"] == pytest.approx(domain.perplexity, rel=1e-5)
    assert numbers["domain_tokens"] == domain.tokens
    assert numbers["general_ppl"] == pytest.approx(general.perplexity, rel=1e-5)
    assert numbers["general_tokens"] == general.tokens == 58


def test_speed_memory_and_ratios_are_there(results):
    for result in results:
        for name in (
            "prefill_tps_b1",
            "prefill_tps_b8",
            "decode_tps_b1",
            "decode_tps_b8",
            "peak_memory_bytes",
        ):
            assert result.numbers[name] > 0
    assert results[0].numbers["decode_speedup_b8"] == 1.0
    assert results[1].numbers["prefill_speedup_b1_low"] <= results[1].numbers["prefill_speedup_b1"]


def test_one_folder_without_speed_or_prose(folders):
    (result,) = compare({"small": folders["compact"]}, ROWS, speed=False, settings=SETTINGS)
    assert result.label == "small"
    assert result.folder == folders["compact"]
    assert {"domain_ppl", "params_total"} <= set(result.numbers)
    assert not {"general_ppl", "prefill_tps_b1", "peak_memory_bytes"} & set(result.numbers)


def test_saved_evaluation_keeps_every_number_and_the_settings(results, tmp_path):
    save_evaluation(tmp_path / "evaluation.json", results, EvalSettings(device="cpu"))
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert [entry["label"] for entry in saved["results"]] == ["base", "compact"]
    assert saved["results"][1]["numbers"] == results[1].numbers
    assert saved["settings"]["dtype"] in ("float32", "bfloat16")


def test_no_folder_is_refused():
    with pytest.raises(DataError, match="at least one folder"):
        compare({}, ROWS)


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ({"avx512f", "avx512_bf16"}, True),
        ({"amx_bf16"}, True),
        ({"fp", "bf16"}, True),
        ({"avx2", "avx512f"}, False),
    ],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(flags, fast, monkeypatch):
    assert cpu_has_bf16(flags) is fast
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: flags)
    assert default_dtype("cpu") == ("bfloat16" if fast else "float32")
