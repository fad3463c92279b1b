"""All measurements of model folders on the same rows: sizes, perplexities, speed, peak memory.

Numbers of an EvalResult, by name:

===========================  ==========================================================================
params_total                 parameters, tied embeddings counted once
params_decoder               parameters of the decoder's linear layers
weight_bytes                 bytes of the weight files on disk, whatever their dtype
weight_bytes_bf16            bytes of the same weights in bfloat16: comparable between folders
flops_per_token              forward FLOPs of one prompt token, averaged over the prompt
domain_ppl, general_ppl      perplexity over the rows' target tokens / over prose
domain_nll, general_nll      their logarithms, nats per token
domain_tokens, ..._top1      target tokens, and the fraction of them that was the likeliest
exact_match                  fraction of rows whose generated final answer is the right one, if asked for
prefill_tps_b1 ... b8        prompt tokens per second at batch 1 and 8 (median; _low and _high: quartiles)
decode_tps_b1 ... b8         generated tokens per second over the whole batch, likewise
prefill_speedup_b1 ...       ratio to the first model of the comparison, likewise
peak_memory_bytes            peak of a fresh process that loads the model and reads one prompt
idle_memory_bytes            the part of it that was there before the model (libraries)
===========================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetune.core.console import note
from prunetune.core.errors import DataError
from prunetune.core.files import read_json, write_json
from prunetune.core.records import EvalResult
from prunetune.evaluate.device import default_device, default_dtype
from prunetune.evaluate.exact_match import exact_match
from prunetune.evaluate.memory import peak_memory
from prunetune.evaluate.perplexity import domain_perplexity, text_perplexity
from prunetune.evaluate.speed import Speed, compare_speed
from prunetune.model.architecture import describe
from prunetune.model.budget import decoder_params, flops_per_token, full_shape, total_params, weight_bytes
from prunetune.model.resolve import STOCK


@dataclass(frozen=True)
class EvalSettings:
    """How to measure; the same for every model of a comparison.

    Args:
        max_length: tokens of a row; longer rows are cut at the end.
        batch_size: rows of one forward pass.
        completion_only: targets are completions only; None: if rows have them.
        assistant_only: targets are the assistant's tokens.
        general_tokens: tokens of the general text. window: tokens of one of its windows.
        answer: see ``exact_match``; None: no answers are generated. answer_rows: rows that are answered.
        answer_tokens: an answer is at most this long.
        dtype: of weights and arithmetic; auto: bfloat16 where the hardware has it.
        device: cpu, cuda, or auto.
        prompt_tokens, new_tokens, repeats: of the speed measurement.
    """

    max_length: int = 512
    batch_size: int = 8
    completion_only: bool | None = None
    assistant_only: bool = False
    general_tokens: int = 8192
    window: int = 512
    answer: str | None = None
    answer_rows: int = 100
    answer_tokens: int = 256
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 5

    def resolved(self) -> EvalSettings:
        """The same with ``auto`` replaced."""
        device = default_device() if self.device == "auto" else self.device
        dtype = default_dtype(device) if self.dtype == "auto" else self.dtype
        return EvalSettings(**(asdict(self) | {"device": device, "dtype": dtype}))


def compare(
    folders: Mapping[str, Path],
    rows: Iterable[Mapping[str, Any]],
    general_text: str = "",
    *,
    speed: bool = True,
    settings: EvalSettings | None = None,
) -> list[EvalResult]:
    """Measures model folders on the same rows and text; the first is what changes refer to.

    Args:
        folders: label -> folder that stock transformers opens.
        rows: held-out rows in prompt-completion, messages or text form.
        general_text: prose outside the domain; empty: no general perplexity.
        speed: also measure speed and peak memory (all models are in memory at once meanwhile).

    Returns:
        One result per folder, in order; the module's docstring names the numbers.

    Raises:
        DataError: no folder or no usable row.
        UnsupportedModelError: a model whose parameters cannot be attributed to units.
    """
    if not folders:
        raise DataError("there is no model to evaluate; give at least one folder")
    settings = (settings or EvalSettings()).resolved()
    rows = list(rows)
    numbers = {label: _sizes(Path(folder), settings) for label, folder in folders.items()}
    models = {}
    for label, folder in folders.items():
        model, tokenizer = _load(Path(folder), settings)
        numbers[label] |= quality(label, model, tokenizer, rows, general_text, settings)
        if speed:
            models[label] = model
    if speed:
        for label, found in _speeds(models, settings).items():
            numbers[label] |= found
        models.clear()
        for label, folder in folders.items():
            numbers[label] |= _memory(label, Path(folder), settings)
    return [EvalResult(label, Path(folder), numbers[label]) for label, folder in folders.items()]


def save_evaluation(path: Path, results: list[EvalResult], settings: EvalSettings) -> None:
    """Writes evaluation.json: the settings with ``auto`` resolved, and every number of every model."""
    write_json(
        path,
        {
            "settings": asdict(settings.resolved()),
            "results": [
                {"label": result.label, "folder": str(result.folder), "numbers": result.numbers} for result in results
            ],
        },
    )


def _load(folder: Path, settings: EvalSettings) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype), **STOCK)
    return model.to(settings.device).eval(), AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )


def _sizes(folder: Path, settings: EvalSettings) -> dict[str, float]:
    arch = describe(read_json(folder / "config.json"))
    shape = full_shape(arch)
    files = [file for pattern in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)]
    return {
        "params_total": total_params(arch, shape),
        "params_decoder": decoder_params(arch, shape),
        "weight_bytes": sum(file.stat().st_size for file in files),
        "weight_bytes_bf16": weight_bytes(arch, shape, "bfloat16"),
        "flops_per_token": flops_per_token(arch, shape, settings.prompt_tokens // 2),
    }


def quality(
    label: str, model: Any, tokenizer: Any, rows: list[Any], general_text: str, settings: EvalSettings
) -> dict[str, float]:
    """The perplexities of a model in memory, and its exact matches if answers are asked for."""
    domain = domain_perplexity(
        model,
        tokenizer,
        rows,
        settings.max_length,
        settings.batch_size,
        completion_only=settings.completion_only,
        assistant_only=settings.assistant_only,
    )
    found: dict[str, float] = {
        "domain_ppl": domain.perplexity,
        "domain_nll": domain.nll,
        "domain_tokens": domain.tokens,
        "domain_top1": domain.top1,
    }
    said = f"{label}: domain perplexity {domain.perplexity:.2f} over {domain.tokens} target tokens"
    if general_text:
        general = text_perplexity(model, tokenizer, general_text, settings.general_tokens, settings.window)
        found |= {
            "general_ppl": general.perplexity,
            "general_nll": general.nll,
            "general_tokens": general.tokens,
            "general_top1": general.top1,
        }
        said += f", general {general.perplexity:.2f} over {general.tokens}"
    if settings.answer:
        asked = rows[: settings.answer_rows]
        found["exact_match"] = exact_match(
            model, tokenizer, asked, settings.answer, settings.answer_tokens, settings.batch_size
        )
        said += f", {found['exact_match']:.1%} of {len(asked)} answers exact"
    note(said)
    return found


def _speeds(models: Mapping[str, Any], settings: EvalSettings) -> dict[str, dict[str, float]]:
    note(f"speed: {settings.repeats} turns of each model at batch 1 and 8, {settings.dtype}, {settings.device}")
    speeds = compare_speed(
        models,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
    )
    return {label: _flat(speed) for label, speed in speeds.items()}


def _flat(speed: Speed) -> dict[str, float]:
    named = dict(speed.tokens_per_second)
    named |= {name.replace("_tps_", "_speedup_"): spread for name, spread in speed.ratios.items()}
    found: dict[str, float] = {}
    for name, spread in named.items():
        found |= {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
    return found


def _memory(label: str, folder: Path, settings: EvalSettings) -> dict[str, float]:
    note(f"{label}: peak memory in a fresh process")
    peak = peak_memory(folder, settings.dtype, settings.device, settings.prompt_tokens)
    return {"peak_memory_bytes": peak.peak_bytes, "idle_memory_bytes": peak.idle_bytes}
