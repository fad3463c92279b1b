"""`prunetune data score`: names to rows and models, then one scoring pass into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel

from prunetune.core.console import note
from prunetune.core.errors import ConfigError, DataError, Problem
from prunetune.data import prepare, sources
from prunetune.data.gradients import AdamMoments
from prunetune.data.prepare import Report
from prunetune.data.scorer import DEFAULT_EXTRAS, ScoringOptions
from prunetune.data.scoring import score
from prunetune.data.store import StoredScores
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.quiet import quiet_libraries
from prunetune.train.moments import MOMENTS_FILE, Moments

BASE = "base"


def score_run(
    data: str,
    model: str,
    out: Path,
    *,
    max_length: int = 512,
    dtype: str | None = None,
    reference: str | None = None,
    extras: tuple[str, ...] = DEFAULT_EXTRAS,
    validation: str | None = None,
    max_rows: int | None = None,
    final_answer: str | None = None,
    seed: int = 0,
) -> StoredScores | None:
    """Scores a data file with a model, into a folder; a stopped pass goes on.

    Args:
        data: a file, saved datasets folder or hub id.
        model: a model folder or name, or a folder with a LoRA adapter; a checkpoint of a run brings Adam's moments for
            ``influence``. A smaller model of the same tokenizer scores
            faster and ranks much the same rows (a proxy).
        out: the folder of scores.
        max_length: tokens that rows are cut to; as in the training that follows.
        dtype: of the weights; default bfloat16 on a GPU, float32 on a CPU.
        reference: a second model for excess losses, or ``base``: the adapter folder's base.
        extras: further statistics, names of ``prunetune.data.scorer.EXTRAS``.
        validation: rows that ``influence`` is about.
        max_rows: only so many rows, chosen by content.
        final_answer: regular expression; what follows its last match is never pruned.
        seed: of random projections.

    Returns:
        The scores, on the first process; None on the others.
    """
    quiet_libraries()
    state = PartialState()
    options = ScoringOptions(tuple(dict.fromkeys(extras)), final_answer=final_answer)
    if "influence" in options.extras and validation is None:
        raise ConfigError([Problem("influence is about validation rows: name a file with them", "--validation")])
    if reference == BASE and not (Path(model) / "adapter_config.json").is_file():
        raise ConfigError(
            [Problem(f"base is the model with its adapter off, and {model} is not an adapter folder", "--reference")]
        )
    dtype = dtype or ("bfloat16" if state.device.type == "cuda" else "float32")
    scorer, tokenizer = _load(model, dtype, state.device)
    other: Any = reference if reference in (None, BASE) else _load(reference, dtype, state.device)[0]
    rows = _rows(data, "the data file", tokenizer, max_rows)
    held = _rows(validation, "--validation", tokenizer, None) if validation is not None else []
    moments = _moments(Path(model)) if "influence" in options.extras else None
    done: StoredScores | None = None
    for _ in ("own shards", "what the other processes did"):
        done = score(
            rows,
            scorer,
            tokenizer,
            folder=out,
            max_length=max_length,
            options=options,
            reference=other,
            validation=held,
            moments=moments,
            seed=seed,
            process=(state.process_index, state.num_processes),
            names={"model": model, "reference": reference, "tokenizer": tokenizer.name_or_path, "data": data},
        )
        state.wait_for_everyone()
        if done is not None or not state.is_main_process:
            return done
    raise DataError(f"shards are missing in {out} although all processes are through; run the command again")


def _load(name: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) of a model name or an adapter folder."""
    if (Path(name) / "adapter_config.json").is_file():
        base = resolve_model(str(PeftConfig.from_pretrained(name).base_model_name_or_path))
        try:
            return PeftModel.from_pretrained(load_base(base, dtype), name).to(device), load_tokenizer(base)
        except RuntimeError as error:
            raise DataError(
                f"the adapter in {name} does not fit {base.folder}: checkpoints after a freeze belong to the sliced "
                "model. Score with a checkpoint from before it, or with the run's export"
            ) from error
    prepared = resolve_model(name)
    return load_base(prepared, dtype).to(device), load_tokenizer(prepared)


def _moments(folder: Path) -> AdamMoments | None:
    """Of the optimizer, where ``folder`` is a checkpoint of a run; says which form of influence that makes."""
    if not (folder / MOMENTS_FILE).is_file():
        note(
            f"influence compares gradients: {folder} has no {MOMENTS_FILE}, as a run's checkpoint has, for Adam's steps"
        )
        return None
    saved = Moments.load(folder)
    missing = sorted(name for name, kept in saved.tensors.items() if not {"exp_avg", "exp_avg_sq"} <= kept.keys())
    if missing or not saved.tensors:
        raise DataError(f"{folder / MOMENTS_FILE} is not Adam's, whose steps LESS is about: score without that file")
    note("influence compares the steps that Adam would take from this checkpoint with the validation rows' gradients")
    betas = saved.groups[0]["betas"]
    return AdamMoments(
        {name: kept["exp_avg"] for name, kept in saved.tensors.items()},
        {name: kept["exp_avg_sq"] for name, kept in saved.tensors.items()},
        (float(betas[0]), float(betas[1])),
    )


def _rows(source: str, field: str, tokenizer: Any, max_rows: int | None) -> list[dict[str, Any]]:
    """Rows as the chat template takes them, with the columns ``source`` and ``label`` of the file if it has them."""
    rows = sources.training_rows(sources.read(source, field))
    part, layout = prepare.convert(rows, "auto", bool(tokenizer.chat_template))
    report = Report(notes=[f"{rows.name}: {layout.sentence}"])
    [part] = prepare.one_answer_each([part], report)
    report.show()
    raw = dict(zip(rows.places, rows.values))
    examples = [
        {**{name: raw[place][name] for name in ("source", "label") if name in raw[place]}, **example}
        for place, example in zip(part.places, part.examples)
    ]
    return examples if max_rows is None else [examples[i] for i in _first(examples, max_rows)]


def _first(examples: list[dict[str, Any]], count: int) -> list[int]:
    from prunetune.data.split import sample

    return sample(examples, count, "scored rows")
