"""Who is who: content hashes of rows, tokenizers, chat templates and models, equal on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_SAMPLE = 4096


def digest(*parts: Any) -> str:
    """A hash of JSON-like values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def row_id(example: Mapping[str, Any]) -> str:
    """The id of a row: a hash of what the model is given, never of where the row stands."""
    names = ("prompt", "completion", "messages", "text", "tools", "chat_template_kwargs")
    return digest({name: example[name] for name in names if example.get(name) is not None})


def rows_hash(ids: Iterable[str]) -> str:
    """A hash of a set of rows."""
    return digest(sorted(ids))


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what text becomes: vocabulary, merges and special tokens; the chat template is apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest(rules, {name: str(value) for name, value in tokenizer.special_tokens_map.items()})


def template_hash(tokenizer: Any) -> str:
    """A hash of the chat template."""
    return digest(tokenizer.chat_template)


def model_hash(model: Any) -> str:
    """A hash of a model's shape and of an even sample of every tensor, adapters included."""
    return tensors_hash(dict(model.named_parameters()), model.config.to_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    """A hash of ``facts`` and of an even sample of every tensor."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].contiguous().cpu()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
