"""Damaged and hostile files of every kind that is read: each is what was written, or refused with one of our errors."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from prunetune.core.errors import PrunetuneError
from prunetune.data.scoring import score
from prunetune.data.store import HEADER, read_scores, shard_path
from prunetune.model.architecture import describe
from prunetune.model.budget import full_shape, plan_shape, total_params
from prunetune.model.delta_file import DeltaFile, Kept, _digest, save_delta
from prunetune.model.deltas import Delta, Place
from prunetune.model.gguf_file import metadata_config
from prunetune.model.plan import Plan
from prunetune.model.resolve import check_folder, read_config
from prunetune.model.shards import ShardReader, read_header
from prunetune.model.surgery import Surgery
from prunetune.model.tensor_spool import tensor_digest
from prunetune.model.tuned import Adapter, BaseSlices
from prunetune.train.checkpoint import damage, newest, write_marker
from tests.properties.strategies import JSON, as_json, damaged, mutated
from tests.properties.tiers import run, tiers
from tests.support import random_plan, tiny_arch, tiny_folder, tiny_model, tiny_rows, tiny_tokenizer

ARCH = tiny_arch(tie_word_embeddings=True)
PLAN = random_plan(ARCH)


def accepted(read: Callable[[], Any]) -> Any:
    """What was read; None if it was refused with one of our errors."""
    try:
        return read()
    except PrunetuneError as error:
        assert len(str(error)) > 15, "an error says what to do"  # noqa: PT017
        return None


# ---- plans

_PLAN = {
    "format": "prunetune-plan",
    "version": 1,
    "architecture": PLAN.architecture,
    "origin": {},
    "kept": {name: list(kept) for name, kept in PLAN.kept.items()},
}


@given(mutated(_PLAN).map(as_json).map(str.encode) | damaged(as_json(_PLAN).encode()))
def plans_are_legal_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "plan.json"
    path.write_bytes(content)

    def apply() -> Plan:
        plan = Plan.load(path)
        Surgery(ARCH, plan)
        return plan

    plan = accepted(apply)
    if plan is None:
        return
    for kept in plan.kept.values():
        assert list(kept) == sorted(set(kept))
    plan.save(path)
    assert Plan.load(path).digest() == plan.digest()
    try:
        shape = plan_shape(ARCH, plan)
    except PrunetuneError:
        return
    assert 0 < total_params(ARCH, shape) <= total_params(ARCH, full_shape(ARCH))


# ---- models


@given(st.data())
def model_folders_are_whole_or_refused(folder: Path, data: st.DataObject) -> None:
    source = folder / "model"
    if not source.exists():
        tiny_folder(source, tie_word_embeddings=True, num_hidden_layers=1)
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"]))
    content = (source / name).read_bytes()
    if name != "model.safetensors" and data.draw(st.booleans()):
        new = as_json(data.draw(mutated(json.loads(content)))).encode(errors="surrogatepass")
    else:
        new = data.draw(damaged(content))
    (copy / name).write_bytes(new)

    def read() -> Any:
        config = read_config(str(copy))
        check_folder(copy, config)
        return describe(config)

    arch = accepted(read)
    assert arch is None or total_params(arch, full_shape(arch)) > 0


_PLACES = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["one.safetensors", "../outside.safetensors", "/etc/passwd", "", ".", "two.safetensors"]) | JSON,
    max_size=3,
)


@given(_PLACES | JSON)
def weights_indexes_stay_in_their_folder(folder: Path, places: Any) -> None:
    inside = folder / "inside"
    if not inside.exists():
        inside.mkdir()
        for path in (folder / "outside.safetensors", inside / "one.safetensors", inside / "two.safetensors"):
            save_file({"a": torch.zeros(2), "b": torch.ones(2)}, path)
    (inside / "model.safetensors.index.json").write_text(as_json({"weight_map": places}))
    reader = accepted(lambda: ShardReader(inside))
    if reader is not None:
        assert {entry.file for entry in reader.entries.values()} <= {"one.safetensors", "two.safetensors"}
        for name in reader.names():
            assert reader.read(name).shape == (2,)


_HEADER = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}


@given(mutated(_HEADER) | JSON, st.integers(-3, 3) | st.integers(0, 2**64 - 1), st.integers(0, 40))
def weights_headers_are_sound_or_refused(folder: Path, header: Any, shift: int, size: int) -> None:
    path = folder / "model.safetensors"
    text = as_json(header).encode(errors="surrogatepass")
    length = len(text) + shift if abs(shift) <= 3 else shift
    path.write_bytes(struct.pack("<Q", max(0, length) % 2**64) + text + bytes(size))
    entries = accepted(lambda: read_header(path))
    for entry in (entries or {}).values():
        assert entry.size_bytes >= 0


def _gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {
        "embedding_length": 48,
        "feed_forward_length": 64,
        "block_count": 2,
        "attention.head_count": 6,
        "context_length": 128,
    }
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    pairs += [text(f"llama.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()]
    pairs += [text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)]
    pairs += [text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")]
    tensors = [text("output.weight") + struct.pack("<IQQIQ", 2, 48, 2, 0, 0)]
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join([*pairs, *tensors])


@given(damaged(_gguf()) | st.binary(max_size=80).map(lambda tail: b"GGUF\x03\x00\x00\x00" + tail))
def gguf_headers_are_sound_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "model.gguf"
    path.write_bytes(content)
    config = accepted(lambda: metadata_config(path))
    if config is not None:
        accepted(lambda: describe(config))


# ---- adapters and deltas


def _adapter(folder: Path) -> Path:
    if not (folder / "adapter").exists():
        tiny_folder(folder / "base", tie_word_embeddings=True, num_hidden_layers=1)
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(tiny_model(tie_word_embeddings=True, num_hidden_layers=1), lora)
        model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def _deltas(tuned: Any, base: BaseSlices) -> dict[str, torch.Tensor]:
    return {
        name: tuned.delta(Place(name, shape), base).rows(0, shape[0]) for name, shape in tuned.changed(base).items()
    }


@given(st.data())
def adapters_are_sound_or_refused(folder: Path, data: st.DataObject) -> None:
    source = _adapter(folder)
    base, copy = BaseSlices(ShardReader(folder / "base"), {}), folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    config = json.loads((source / "adapter_config.json").read_text())
    if data.draw(st.booleans()):
        (copy / "adapter_config.json").write_text(as_json(data.draw(mutated(config))))
    else:
        content = (source / "adapter_model.safetensors").read_bytes()
        (copy / "adapter_model.safetensors").write_bytes(data.draw(damaged(content)))
    accepted(lambda: _deltas(Adapter(copy), base))


class _Fixed(Delta):
    """A matrix that is there."""

    def __init__(self, name: str, matrix: torch.Tensor):
        super().__init__(Place(name, (matrix.shape[0], matrix.shape[1])))
        self._matrix = matrix

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._matrix[start:stop]


def _delta_file(folder: Path, data: st.DataObject) -> Path:
    """A file with one matrix as its seed draws it, the other in one of the encodings with places."""
    base, encoding = ShardReader(_adapter(folder).parent / "base"), data.draw(st.sampled_from(["gaps", "bitmask"]))
    path = folder / f"{encoding}.delta"
    if not path.exists():
        (one, drawn), (other, kept) = _deltas(Adapter(folder / "adapter"), BaseSlices(base, {})).items()
        bound = kept.abs().flatten().quantile(0.97 if encoding == "gaps" else 0.5)
        parts = [Kept(_Fixed(one, drawn), 0.5, 0.5), Kept(_Fixed(other, kept * (kept.abs() > bound)))]
        save_delta(path, parts, {}, base, method="dare", model="m", seed=3, dtype=torch.float32)
        found = {entry["encoding"] for entry in DeltaFile(path).facts["matrices"].values()}
        assert found == {"seed", encoding}
    return path


@given(st.data())
def delta_files_are_as_written_or_refused(folder: Path, data: st.DataObject) -> None:
    path = _delta_file(folder, data)
    base = BaseSlices(ShardReader(folder / "base"), {})
    wanted = _deltas(DeltaFile(path), base)
    (folder / "b.delta").write_bytes(data.draw(damaged(path.read_bytes())))
    found = accepted(lambda: _deltas(DeltaFile(folder / "b.delta"), base))
    if found is not None:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), "a changed file gave another delta"


@given(st.data())
def forged_delta_files_are_sound_or_refused(folder: Path, data: st.DataObject) -> None:
    """Written anew with a digest that is right, by somebody who means harm."""
    from safetensors import safe_open

    path = _delta_file(folder, data)
    base = BaseSlices(ShardReader(folder / "base"), {})
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["facts"])
    said = as_json(data.draw(mutated(facts) | st.just(facts)))
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor, place = tensors[name], data.draw(st.integers(0, len(tensors[name]) - 1))
    changed = tensor.clone()
    changed[place] = data.draw(st.sampled_from([0, 1, 255 if tensor.dtype == torch.uint8 else -1]))
    change = data.draw(st.sampled_from(["keep", "one", "cut", "double", "float", "wide", "reverse"]))
    tensors[name] = {
        "keep": tensor,
        "one": changed,
        "cut": tensor[:-1].clone(),
        "double": tensor * 2,
        "float": tensor.double(),
        "wide": tensor.long() * 2**61,
        "reverse": tensor.flip(0),
    }[change]
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    metadata = {"format": "prunetune-delta", "facts": said, "sha256": _digest(said, digests)}
    save_file(tensors, folder / "b.delta", metadata=metadata)
    found = accepted(lambda: _deltas(DeltaFile(folder / "b.delta"), base))
    for name, delta in (found or {}).items():
        assert tuple(delta.shape) == base.shape(name)


# ---- scores and checkpoints


@given(st.data())
def score_stores_are_sound_or_refused(folder: Path, data: st.DataObject) -> None:
    source, copy = folder / "scores", folder / "copy"
    if not source.exists():
        score(tiny_rows(4), tiny_model(num_hidden_layers=1), tiny_tokenizer(), folder=source, max_length=16)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    shard, kind = shard_path(copy, 0), data.draw(st.integers(0, 3))
    if kind == 0:
        header = json.loads((source / HEADER).read_text())
        (copy / HEADER).write_text(as_json(data.draw(mutated(header) | JSON)))
    elif kind == 1:
        shard.write_bytes(data.draw(damaged(shard.read_bytes())))
    else:
        _spoil(data, shard)
    found = accepted(lambda: read_scores(copy))
    if found is None:
        return
    assert len(found.table) == len(found.input_ids) == len(found.labels) == len(found.examples)
    for name, column in found.table.tokens.items():
        assert len(column) == int(found.table.offsets[-1]), name
    assert np.isfinite(found.table.offsets).all()


def _spoil(data: st.DataObject, shard: Path) -> None:
    table = pq.read_table(shard)
    name = data.draw(st.sampled_from(table.column_names))
    place, kind = table.column_names.index(name), data.draw(st.integers(0, 4))
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1:
        table = table.slice(0, data.draw(st.integers(0, len(table) - 1)))
    elif kind == 2:
        table = table.take(list(reversed(range(len(table)))))
    elif kind == 3:
        table = pa.concat_tables([table, table])
    else:
        values: Any = data.draw(
            st.sampled_from([[None] * len(table), ["x"] * len(table), [[1, 2]] * len(table), [1.5] * len(table)])
        )
        table = table.set_column(place, name, pa.array(values))
    pq.write_table(table, shard)


@given(st.data())
def checkpoints_are_as_written_or_passed_over(folder: Path, data: st.DataObject) -> None:
    train = folder / "train"
    shutil.rmtree(train, ignore_errors=True)
    for step in (2, 4):
        made = train / f"checkpoint-{step}"
        made.mkdir(parents=True)
        (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (made / "adapter_model.safetensors").write_bytes(bytes(range(100)))
        write_marker(made, {"train_tokens": step, "frozen": False})
    spoilt = (
        train
        / "checkpoint-4"
        / data.draw(st.sampled_from(["trainer_state.json", "adapter_model.safetensors", "prunetune.json"]))
    )
    before = spoilt.read_bytes()
    spoilt.write_bytes(data.draw(damaged(before)))
    same = spoilt.suffix == ".json" and accepted_json(spoilt) == json.loads(before) and spoilt.name == "prunetune.json"
    assert newest(train, train / "freeze") == train / f"checkpoint-{4 if same else 2}"
    assert bool(damage(train / "checkpoint-4")) != same


def accepted_json(path: Path) -> Any:
    """The JSON in a file; None if there is none. Blanks behind a marker do not change what it says."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        return None


@tiers(
    plans_are_legal_or_refused,
    model_folders_are_whole_or_refused,
    weights_indexes_stay_in_their_folder,
    weights_headers_are_sound_or_refused,
    gguf_headers_are_sound_or_refused,
    adapters_are_sound_or_refused,
    delta_files_are_as_written_or_refused,
    forged_delta_files_are_sound_or_refused,
    score_stores_are_sound_or_refused,
    checkpoints_are_as_written_or_passed_over,
)
def test_property(tmp_path: Path, capsys: pytest.CaptureFixture[str], holds: Any, cases: int) -> None:
    run(holds, cases, tmp_path)
