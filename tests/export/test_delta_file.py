"""Delta files: exactly the pruned delta in the smallest encoding, for the right base only, damaged ones refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prunetune.cli.main import app
from prunetune.core.errors import DataError, PlanMismatchError, UnsupportedModelError
from prunetune.export.stream_merge import MergeSettings
from prunetune.model import delta_file
from prunetune.model.delta_file import DeltaFile
from prunetune.model.deltas import Place
from prunetune.model.shards import ShardReader
from prunetune.model.tuned import BaseSlices
from prunetune.pipeline.delta_save import save_run
from prunetune.pipeline.merge_request import MergeRequest
from tests.export.test_stream_merge import CONFIGS, adapter, merged, saved, tensors
from tests.support import tiny_model

EXACT = MergeSettings(dtype=torch.float32)


def stored(
    base: Path,
    tuned: Path,
    file: Path,
    drop: float | None = 0.7,
    settings: MergeSettings = EXACT,
    allow_large: bool = True,
    delta: str | None = None,
) -> Path:
    options = {} if drop is None else {"drop": drop}
    save_run(
        MergeRequest([tuned], str(base), delta=delta, options=options, settings=settings, allow_large=allow_large), file
    )
    return file


@pytest.mark.parametrize("kind", CONFIGS)
def test_applying_a_file_is_merging_with_dare(kind, base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter", **CONFIGS[kind])
    file = stored(base, tuned, tmp_path / "tiny.delta")
    expected = tensors(merged(tmp_path, [tuned], base, "direct", delta="dare", options={"drop": 0.7}, allow_large=True))
    found = tensors(merged(tmp_path, [file], base, "applied"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected), "bit for bit"
    small = tensors(merged(tmp_path, [file], base, "blocks", settings=MergeSettings(block_bytes=1)))
    assert all(torch.equal(small[name], found[name]) for name in found)


# Method, rate -> the encoding that is the smallest for it.
SMALLEST = {
    ("dare", 0.7): "seed",
    ("dare", 1.0): "seed",
    ("dare", 0.0): "dense",
    ("magnitude", 0.6): "bitmask",
    ("magnitude", 0.97): "gaps",
    ("magnitude", 1.0): "gaps",
    ("della", 0.9): "gaps",
    ("structural", 0.5): "bitmask",
    ("rank", None): "dense",
    ("identity", None): "dense",
}


@pytest.mark.parametrize(("delta", "drop"), SMALLEST)
def test_every_method_comes_back_bit_for_bit_in_the_smallest_encoding(
    delta: str, drop: float | None, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = adapter(base, tmp_path / "adapter")
    file = stored(base, tuned, tmp_path / "small.delta", drop, delta=delta)
    said = " ".join(capsys.readouterr().out.split())
    found = DeltaFile(file)
    encodings = [entry["encoding"] for entry in found.facts["matrices"].values()]
    assert max(set(encodings), key=encodings.count) == SMALLEST[delta, drop]
    assert f"smallest encoding: {encodings[0]}" in said
    options = {} if drop is None else {"drop": drop}
    expected = tensors(merged(tmp_path, [tuned], base, "direct", delta=delta, options=options, allow_large=True))
    applied = tensors(merged(tmp_path, [file], base, "applied"))
    assert all(torch.equal(applied[name], expected[name]) for name in expected)
    slices = BaseSlices(ShardReader(base), {})
    for name, shape in found.changed(slices).items():
        part = found.delta(Place(name, shape), slices)
        pieces = [part.rows(start, min(start + 7, shape[0])) for start in range(0, shape[0], 7)]
        assert torch.equal(torch.cat(pieces), part.whole())


def test_files_are_written_block_by_block(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = adapter(base, tmp_path / "adapter")
    for delta in ("dare", "magnitude"):
        whole = stored(base, tuned, tmp_path / f"{delta}.delta", 0.9, delta=delta)
        monkeypatch.setattr(delta_file, "_BLOCK_BYTES", 1)
        assert stored(base, tuned, tmp_path / f"{delta}1.delta", 0.9, delta=delta).read_bytes() == whole.read_bytes()
        monkeypatch.undo()


def test_a_whole_models_delta_shrinks_with_what_is_dropped(base, tmp_path):
    tuned = saved(tiny_model(seed=3, tie_word_embeddings=False), tmp_path / "tuned")
    sizes = [stored(base, tuned, tmp_path / f"{drop}.delta", drop).stat().st_size for drop in (0.0, 0.5)]
    assert sizes[0] > 1.7 * sizes[1]
    with pytest.raises(DataError, match="large"):
        stored(base, tuned, tmp_path / "refused.delta", 0.9, allow_large=False)
    everything = tensors(merged(tmp_path, [tmp_path / "0.0.delta"], base, "all"))
    for name, tensor in tensors(tuned).items():
        torch.testing.assert_close(everything[name], tensor, atol=1e-6, rtol=1e-6)
    none = stored(base, tuned, tmp_path / "none.delta", 1.0)
    assert torch.equal(
        tensors(merged(tmp_path, [none], base, "none"))["lm_head.weight"], tensors(base)["lm_head.weight"]
    )


def test_a_tied_models_file_keeps_the_tie(tmp_path: Path) -> None:
    base, tuned = (saved(tiny_model(seed=seed, tie_word_embeddings=True), tmp_path / f"{seed}") for seed in (0, 3))
    file = stored(base, tuned, tmp_path / "tied.delta", 0.6, delta="magnitude")
    found = tensors(merged(tmp_path, [file], base, "applied"))
    assert "lm_head.weight" not in found
    expected = tensors(merged(tmp_path, [tuned], base, "direct", delta="magnitude", options={"drop": 0.6}))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_base_and_damage_are_refused(base, tmp_path):
    tuned = adapter(base, tmp_path / "adapter")
    file = stored(base, tuned, tmp_path / "tiny.delta")
    other = saved(tiny_model(seed=9, tie_word_embeddings=False), tmp_path / "other")
    with pytest.raises(PlanMismatchError, match="fingerprint"):
        merged(tmp_path, [file], other)
    with pytest.raises(DataError, match="exists"):
        stored(base, tuned, file)
    content = file.read_bytes()
    (tmp_path / "short.delta").write_bytes(content[:-50])
    with pytest.raises(UnsupportedModelError, match="truncated"):
        DeltaFile(tmp_path / "short.delta")
    changed = bytearray(content)
    changed[-3] ^= 0x40
    (tmp_path / "changed.delta").write_bytes(bytes(changed))
    with pytest.raises(UnsupportedModelError, match="was changed"):
        DeltaFile(tmp_path / "changed.delta")
    save_file(load_file(file), tmp_path / "plain.safetensors")
    with pytest.raises(UnsupportedModelError, match="no delta file"):
        DeltaFile(tmp_path / "plain.safetensors")
    assert not (tmp_path / "merged").exists()


def test_save_and_apply_as_they_are_typed(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(base, tmp_path / "adapter")
    rows = "".join(json.dumps({"text": f"w{i} w{i + 1} w5 w9 w2"}) + "\n" for i in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = ["delta", "save", "adapter", "--base", "base", "--drop", "90%", "--calibration", "rows.jsonl"]
    done = CliRunner().invoke(app, [*words, "--out", "tiny.delta"])
    assert done.exit_code == 0, done.output
    assert "smallest encoding: seed" in done.output
    facts = DeltaFile(tmp_path / "tiny.delta").facts
    assert facts["method"] == "darex_q"
    assert "multiplier" in done.output, "q was searched"
    assert all(0.0999 < entry["divisor"] <= 1 for entry in facts["matrices"].values())
    done = CliRunner().invoke(app, ["delta", "apply", "tiny.delta", "--base", "base", "--out", "merged"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "merged/config.json").exists()
    assert CliRunner().invoke(app, [*words[:5], "--drop", "120%", "--out", "x.delta"]).exit_code == 2
    done = CliRunner().invoke(app, [*words[:7], "--delta", "magnitude", "--out", "largest.delta"])
    assert done.exit_code == 0, done.output
    assert DeltaFile(tmp_path / "largest.delta").facts["method"] == "magnitude"
