import json

import pytest
import torch

from prunetune.core.errors import UnsupportedModelError
from prunetune.model.shards import INDEX_FILE, SINGLE_FILE, ShardReader, ShardWriter


def tensors(count=5, rows=4):
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(rows, 8, generator=generator) for i in range(count)}


def test_one_file_when_everything_fits(tmp_path):
    values = tensors()
    assert ShardWriter(tmp_path, 10**6).write(values.items()) == 5 * 4 * 8 * 4
    assert {path.name for path in tmp_path.iterdir()} == {SINGLE_FILE}
    reader = ShardReader(tmp_path)
    assert set(reader.names()) == set(values)
    assert all(torch.equal(reader.read(name), value) for name, value in values.items())


def test_rolling_shards_keep_the_size_limit_and_the_index(tmp_path):
    values = tensors(5)
    ShardWriter(tmp_path, 2 * 4 * 8 * 4).write(values.items())
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 5 * 4 * 8 * 4
    reader = ShardReader(tmp_path)
    assert reader.size_bytes() == 5 * 4 * 8 * 4
    assert all(torch.equal(reader.read(name), value) for name, value in values.items())
    assert reader.entries["layer.0.weight"].shape == (4, 8)


def test_a_tensor_above_the_limit_gets_its_own_file(tmp_path):
    ShardWriter(tmp_path, 16).write(tensors(2).items())
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 2


def test_bfloat16_survives(tmp_path):
    value = torch.randn(3, 3).bfloat16()
    ShardWriter(tmp_path, 10**6).write([("w", value)])
    reader = ShardReader(tmp_path)
    assert reader.entries["w"].dtype == "BF16"
    assert torch.equal(reader.read("w"), value)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_file_is_refused(tmp_path, kept):
    ShardWriter(tmp_path, 10**6).write(tensors().items())
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(content[:kept])
    with pytest.raises(UnsupportedModelError, match="truncated or damaged"):
        ShardReader(tmp_path)


def test_missing_shard_is_named(tmp_path):
    ShardWriter(tmp_path, 150).write(tensors(3).items())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="model-00002-of-00003"):
        ShardReader(tmp_path)


def test_tensor_that_the_index_misplaces_is_named(tmp_path):
    ShardWriter(tmp_path, 150).write(tensors(3).items())
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match="ghost"):
        ShardReader(tmp_path)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="only safetensors"):
        ShardReader(tmp_path)
