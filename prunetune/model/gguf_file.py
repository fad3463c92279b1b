"""GGUF files as base models: reading their metadata in milliseconds, converting them once to a normal folder.

The metadata is parsed here, because the gguf package's reader takes seconds on the vocabulary alone.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunetune.core.errors import UnsupportedModelError
from prunetune.core.files import new_folder, sha256

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays within arrays
# What a llama-type GGUF calls the fields of LlamaConfig.
_LLAMA_FIELDS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


class _Cursor:
    """Reads GGUF's little-endian values one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.place = 0

    def skip(self, size: int) -> None:
        """Moves on by ``size`` bytes, which must all be there."""
        self.place += size
        if self.place > len(self.data):
            raise ValueError(f"{size} bytes are announced at {self.place - size}, beyond the end")

    def scalar(self, layout: str) -> Any:
        value = struct.unpack_from(layout, self.data, self.place)[0]
        self.place += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        self.skip(length)
        return self.data[self.place - length : self.place].decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of a GGUF type; of an array only its length (vocabularies are not needed here)."""
        if depth > _DEEPEST:
            raise ValueError("arrays within arrays without end")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("<I"), self.scalar("<Q")
        if item in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[item]))
        else:
            for _ in range(count):
                self.value(item, depth + 1)
        return count


def read_metadata(path: Path) -> tuple[dict[str, Any], frozenset[str]]:
    """Keys with their values (arrays as their lengths), and the names of the tensors, of a GGUF file.

    Raises:
        UnsupportedModelError: not a GGUF file of version 2 or 3, or truncated inside its header.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] not in (2, 3):
                raise UnsupportedModelError(f"{path} is not a GGUF file of version 2 or 3; convert it again")
            cursor.place = 8
            tensors, keys = cursor.scalar("<Q"), cursor.scalar("<Q")
            metadata = {cursor.string(): cursor.value(cursor.scalar("<I")) for _ in range(keys)}
            return metadata, frozenset(_tensor_name(cursor) for _ in range(tensors))
    except (struct.error, KeyError, ValueError, IndexError) as error:
        raise UnsupportedModelError(f"{path} is truncated or damaged; download it again") from error


def _tensor_name(cursor: _Cursor) -> str:
    name = cursor.string()
    dimensions = cursor.scalar("<I")
    cursor.skip(8 * dimensions + 4 + 8)  # the lengths, the type, the offset
    return name


def metadata_config(path: Path) -> dict[str, Any]:
    """What config.json will say once the file is converted, without loading weights.

    Raises:
        UnsupportedModelError: an architecture other than llama (convert it first by resolving it).
    """
    metadata, tensors = read_metadata(path)
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise UnsupportedModelError(
            f"{path} holds a {kind!r} model; GGUF files of llama-type models are read directly, "
            "for others save the model as a Hugging Face folder and give that"
        )
    config = {field: metadata[key] for field, key in _LLAMA_FIELDS.items() if key in metadata}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    epsilon = metadata.get("llama.attention.layer_norm_rms_epsilon")
    if not (type(heads) is int and heads > 0 and type(hidden) is int and isinstance(epsilon, float)):
        raise UnsupportedModelError(f"{path} does not say its hidden size, heads and epsilon; convert it again")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config,
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "head_dim": metadata.get("llama.rope.dimension_count", hidden // heads),
        "vocab_size": metadata.get("llama.vocab_size", metadata.get("tokenizer.ggml.tokens")),
        "rms_norm_eps": _decimal(epsilon),
        "rope_parameters": {
            "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
            "rope_type": "default",
        },
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "bfloat16",
    }


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 is stored where 1e-05 was meant."""
    import numpy as np

    return float(str(np.float32(value)))


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``prunetune/models``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "prunetune" / "models"


def converted_folder(path: Path, label: str) -> Path:
    """The folder that ``path`` is (or would be) converted to; its name holds the file's hash."""
    return cache_folder() / f"{label}-{sha256(path)[:16]}"


def convert(path: Path, label: str) -> Path:
    """Converts a GGUF file to a folder that stock transformers opens, once, and returns the folder.

    The weights are stored in bfloat16: a GGUF file's own quantisation step is far larger than what
    bfloat16 rounds off, models of this kind were published in bfloat16, and an export in the same dtype
    then compares byte for byte with its base.

    Raises:
        UnsupportedModelError: the gguf package is missing, or the file is not readable.
    """
    from filelock import FileLock

    target = converted_folder(path, label)
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedModelError(
            f"{path} is a GGUF file, which needs the gguf package once: pip install 'prunetune[gguf]'"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one launch must not each convert: the first does, the others wait and find the folder.
    with FileLock(str(target.parent / f".{target.name}.lock")):
        if not target.is_dir():
            with new_folder(target) as folder:
                _convert_into(path, folder)
    return target


def _convert_into(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metadata, _ = read_metadata(path)
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    _restore_pre_tokenizer(tokenizer, metadata)
    _clear_marks(model)
    model.config.rms_norm_eps = _decimal(model.config.rms_norm_eps)
    eos, pad = metadata["tokenizer.ggml.eos_token_id"], metadata.get("tokenizer.ggml.padding_token_id")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(eos if pad is None else pad)
    for holder in (model.config, model.generation_config):
        holder.eos_token_id, holder.pad_token_id = eos, tokenizer.pad_token_id
    model.generation_config._from_model_config = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _clear_marks(model: Any) -> None:
    """Forgets that the weights came from a quantised file: they are plain tensors now."""
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config._name_or_path = ""
    model.hf_quantizer = None
    model.is_quantized = False


def _restore_pre_tokenizer(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """GGUF names the splitting rule only; ``smollm`` splits off every digit before the GPT-2 rule.

    Without it blanks before a number (code indentation, tables) are cut otherwise than in pretraining.
    """
    if metadata.get("tokenizer.ggml.pre") != "smollm":
        return
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
