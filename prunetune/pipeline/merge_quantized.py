"""Merging into a base that the sources saw quantised: onto which numbers, how far that is from them, and writing it.

The sources were trained beside dequantised weights, so what is merged onto those is what was trained, but for the dtype
that it is written in. Quantised again, small changes are rounded away; the original weights differ by the rounding.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.core.console import note
from prunetune.core.errors import ConfigError, ExportError, Problem
from prunetune.core.files import new_folder, write_json
from prunetune.core.records import PreparedModel
from prunetune.export.stream_merge import MERGE_FILE, StreamMerge
from prunetune.model.quantized_base import DequantizedReader, RoundedReader, quantized_names, rounded, stored_kind
from prunetune.model.resolve import STOCK
from prunetune.model.shards import ShardReader
from prunetune.pipeline.merge_request import Onto

_WORDS = {
    "dequantized": "the dequantised {} weights that the sources were trained beside",
    "original": "the original weights, not the {} ones that the sources were trained beside",
    "requantized": "{} codes again",
}


@dataclass(frozen=True)
class Base:
    """What is merged onto.

    Args:
        written: its numbers. trained: the numbers that the sources saw; the same unless the original is taken.
        kind: nf4, fp4, int8; None: nothing is quantised. onto: what of it is taken.
    """

    written: ShardReader
    trained: ShardReader
    kind: str | None
    onto: Onto


def open_base(prepared: PreparedModel, quantized: str | None, onto: Onto | None) -> Base:
    """The base as numbers.

    Args:
        prepared: its folder. quantized: how it was loaded, if its folder does not say. onto: see MergeRequest.

    Raises:
        ConfigError: the settings contradict the folder.
        UnsupportedModelError: it is quantised in another way.
    """
    stored = stored_kind(prepared.config)
    if stored is not None and quantized not in (None, stored):
        raise ConfigError([Problem(f"is {quantized}, but {prepared.folder} holds {stored} codes", "--quantized")])
    if stored is not None and onto == "original":
        why = f"{prepared.folder} holds {stored} codes; name the original with --base, and --quantized {stored}"
        raise ConfigError([Problem(why, "--onto")])
    kind = stored or quantized
    if kind is None:
        if onto is not None:
            why = "is for bases that were quantised while the sources were trained; say how with --quantized"
            raise ConfigError([Problem(why, "--onto")])
        plain = ShardReader(prepared.folder)
        return Base(plain, plain, None, "original")
    trained: ShardReader
    if stored is not None:
        trained = DequantizedReader(prepared.folder)
    else:
        trained = RoundedReader(prepared.folder, prepared.config, kind)
    written = ShardReader(prepared.folder) if onto == "original" else trained
    return Base(written, trained, kind, onto or "dequantized")


def write_quantized(
    base: Base, merge: StreamMerge, trained: StreamMerge, out: Path, facts: dict[str, Any], *, replace: bool
) -> None:
    """Writes the merge, once its outputs were held against those of the quantised base with the sources beside it.

    Raises:
        ExportError: they are too far apart, or ``out`` exists; nothing was written.
    """
    from prunetune.export.merge_base import describe_difference, difference_to_trained
    from prunetune.pipeline.quiet import quiet_libraries

    quiet_libraries()
    assert base.kind is not None
    again = set(quantized_names(merge.out_config())) if base.onto == "requantized" else set()
    wanted = _logits(trained, {})
    found = _logits(merge, {name: base.kind for name in again})
    difference = difference_to_trained(wanted, found)
    note(f"merged onto {_WORDS[base.onto].format(base.kind)}; {describe_difference(difference)}")
    facts = {**facts, "difference": difference}
    if base.onto != "requantized":
        merge.write(out, facts, replace=replace)
        return
    if out.exists() and not (replace and (out / MERGE_FILE).is_file()):
        raise ExportError(f"{out} exists; name another folder, or replace a former merge there with --overwrite")
    from transformers import AutoModelForCausalLM

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch, new_folder(out, replace=replace) as work:
        dense = Path(scratch) / "dense"
        merge.write(dense, facts)
        model = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=_quantization(base.kind), dtype=merge.settings.dtype, **STOCK
        )
        model.save_pretrained(work)
        for file in dense.iterdir():
            if not (work / file.name).exists() and ".safetensors" not in file.name:
                shutil.copyfile(file, work / file.name)
        write_json(work / MERGE_FILE, facts)


def plain_model(config: dict[str, Any], state: Mapping[str, Tensor]) -> Any:
    """A float32 model of these tensors, in eval mode.

    Args:
        config: of config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    made = AutoConfig.for_model(config["model_type"], **values)
    kind = AutoModelForCausalLM._model_mapping[type(made)]
    return kind.from_pretrained(None, config=made, state_dict=dict(state), dtype=torch.float32).eval()


def _logits(merge: StreamMerge, quantized: Mapping[str, str]) -> list[Tensor]:
    """Of the merged model, some of its weights rounded to codes, on fixed prompts."""

    from transformers import AutoTokenizer

    from prunetune.export.live import logits
    from prunetune.export.verify import prompts_for

    def tensor(name: str) -> Tensor:
        found = merge.tensor(name)
        return rounded(found, quantized[name]) if name in quantized else found.float()

    model = plain_model(merge.out_config(), {name: tensor(name) for name in merge.names})
    try:
        tokenizer = AutoTokenizer.from_pretrained(merge.base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        tokenizer = None  # prompts of random tokens then
    prompts, _ = prompts_for(model, tokenizer)
    return logits(model, prompts, torch.device("cpu"))


def _quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
