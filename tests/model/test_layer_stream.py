"""A model read layer by layer is the model, to the bit, and holds one layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from prunetune.model.layer_stream import LayerStream, Weights
from prunetune.model.shards import ShardReader
from tests.support import MODEL_TYPES, tiny_model

SEQUENCES = [[1, 5, 7, 9, 20, 33, 44, 8, 9, 10, 98], [3, 4, 5]]


def stream_of(folder: Path, dtype: torch.dtype = torch.float32) -> LayerStream:
    weights = Weights(ShardReader(folder))
    return LayerStream(AutoConfig.from_pretrained(folder), weights, torch.device("cpu"), dtype)


def held(stream: LayerStream) -> set[str]:
    return {name for name, p in stream.model.named_parameters() if p.device.type != "meta"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_logits_are_the_whole_model_s(family: str, tied: bool, tmp_path: Path) -> None:
    attention = "eager" if family == "gemma2" else "sdpa"
    model = tiny_model(family, tie_word_embeddings=tied, attention=attention)
    model.save_pretrained(tmp_path)
    stream = stream_of(tmp_path)
    with torch.no_grad():
        expected = [model(torch.tensor([sequence])).logits[0] for sequence in SEQUENCES]
    for found, wanted in zip(stream.logits(SEQUENCES), expected):
        assert torch.equal(found, wanted)
    assert held(stream) == set()


def test_hidden_states_between_layers_are_the_model_s(tmp_path: Path) -> None:
    model = tiny_model(attention="sdpa")
    model.save_pretrained(tmp_path)
    ids = torch.tensor([SEQUENCES[0], SEQUENCES[0][::-1]])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
    stream = stream_of(tmp_path)
    [hidden] = stream.embed([ids])
    assert torch.equal(hidden, expected[0])
    for index in range(2):
        with stream.layer(index):
            assert {name.split(".")[3] for name in held(stream)} == {"self_attn", "mlp", "input_layernorm",
                                                                     "post_attention_layernorm"}  # fmt: skip
            hidden = stream.forward(hidden)
        assert torch.equal(hidden, expected[index + 1])
        assert held(stream) == set()


def test_a_layer_is_given_back_when_something_fails(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    stream = stream_of(tmp_path)
    with pytest.raises(ZeroDivisionError), stream.layer(1):
        raise ZeroDivisionError
    assert held(stream) == set()
    assert stream.logits(SEQUENCES)[0].shape == (11, 99)


def test_only_the_embedding_rows_in_use_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    stream, read = stream_of(tmp_path), []
    monkeypatch.setattr("prunetune.model.layer_stream._ROWS", 10)
    rows = stream.weights.rows
    monkeypatch.setattr(stream.weights, "rows", lambda name, *span: (read.append(span), rows(name, *span))[1])
    monkeypatch.setattr(stream.weights, "read", lambda name: pytest.fail(f"{name} was read whole"))
    hidden = stream.embed([torch.tensor([[1, 5, 7, 45]])])
    assert read == [(0, 10), (40, 50)]
    assert hidden[0].shape == (1, 4, 48)


def test_skipping_layers_is_the_model_without_them(tmp_path: Path) -> None:
    model = tiny_model(attention="sdpa")
    model.save_pretrained(tmp_path)
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    with torch.no_grad():
        expected = model(torch.tensor([SEQUENCES[0]]), use_cache=False).logits[0]
    assert torch.equal(stream_of(tmp_path).logits(SEQUENCES, kept_layers=[0, 2])[0], expected)


def test_float64_is_near_float32(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    single, double = (stream_of(tmp_path, dtype).logits(SEQUENCES)[0] for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert 0 < float((single - double).abs().max()) < 1e-4
