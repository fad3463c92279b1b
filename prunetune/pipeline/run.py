"""A whole run as ordered stages: prepare, data, train, export, evaluate, report. Each leaves files behind, so that
a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.config.presets import derive, export_folder
from prunetune.config.schema import PruneConfig, RunConfig, SampleConfig, TokenConfig
from prunetune.core.console import console, is_main_process, note
from prunetune.core.files import read_json
from prunetune.core.lock import only_one
from prunetune.core.records import DataBundle, EvalResult, ExportedModel, PreparedModel
from prunetune.core.termination import terminable
from prunetune.data.load import PYDOCS, load_bundle
from prunetune.evaluate.harness import EvalSettings, compare, save_evaluation
from prunetune.export.write import METADATA_FILE
from prunetune.methods.compensation import COMPENSATIONS
from prunetune.methods.deltas import DELTAS
from prunetune.methods.masks import MASKS
from prunetune.methods.ranks import RANKS
from prunetune.methods.samples import SAMPLES
from prunetune.methods.tokens import TOKENS
from prunetune.model.architecture import describe
from prunetune.model.budget import describe_kept
from prunetune.model.planner import Planner
from prunetune.model.resolve import resolve_model
from prunetune.model.whole import loading_whole
from prunetune.pipeline.delta_stage import keep_part
from prunetune.pipeline.folder import open_folder
from prunetune.pipeline.loading import TRAIN, load_for_training, load_tokenizer
from prunetune.pipeline.quiet import quiet_libraries
from prunetune.pipeline.steps import run_steps
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.report.table import before_after_table
from prunetune.report.write import write_reports
from prunetune.train.checkpoint import newest
from prunetune.train.freeze import FREEZE
from prunetune.train.settings import lora_config, quantization, sft_config

# Rows of the short validations during training; the evaluation at the end has its own, larger number.
WATCHED_ROWS = 64
METRICS = "metrics.jsonl"
SELECTION = "selection.jsonl"
PYDOCS_LICENCE = "documentation of Python and of the installed packages, each under its own licence"


@dataclass(frozen=True)
class RunReport:
    """What a run leaves behind."""

    folder: Path
    exported: ExportedModel | None
    results: tuple[EvalResult, ...]


@dataclass(frozen=True)
class Done:
    """What is left of the training when the trainer is gone."""

    exported: ExportedModel | None
    budget: str
    steps: int
    seconds: float


def trained_seconds(metrics: Path) -> float:
    """Seconds that the steps of a run took, resumptions included."""
    entries = (json.loads(line) for line in metrics.read_text().splitlines())
    return sum(float(entry.get("step_seconds", 0.0)) for entry in entries)


def run(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> RunReport:
    """Fine-tunes, shrinks, exports, measures and reports, as the configuration says.

    Args:
        config: the run's settings.
        resume: go on with the run in ``config.folder``.
        overwrite: delete a former run there.

    Raises:
        PrunetuneError: with what was set, why it cannot work, and what to set instead.
        KeyboardInterrupt: after Ctrl-C, once everything is saved; after SIGTERM it is a TerminatedError.
    """
    quiet_libraries()
    # The budget is checked before anything is written or loaded.
    prepared = resolve_model(config.model.name, config.model.revision)
    Planner(describe(prepared.config), config.target, config.export.dtype)
    again = "the same command with --resume goes on"
    with terminable(again), only_one(config.folder, when=is_main_process()):
        return _run(config, prepared, resume, overwrite)


def _run(config: RunConfig, prepared: PreparedModel, resume: bool, overwrite: bool) -> RunReport:
    if is_main_process():
        open_folder(config, resume=resume, overwrite=overwrite)
    tokenizer = load_tokenizer(prepared)
    data = load_bundle(
        config.data,
        tokenizer=tokenizer,
        max_length=config.train.max_length,
        seed=config.seed,
        completion_only=config.train.completion_only,
    )
    trainer = train(config, prepared, tokenizer, data, config.prune(), config.folder / TRAIN, resume=resume)
    done = Done(
        exported=_export(config, trainer, tokenizer, data, resume),
        budget=trainer.planner.describe(trainer.shape),
        steps=trainer.state.max_steps,
        seconds=trained_seconds(config.folder / METRICS),
    )
    folders = {"base": prepared.folder}
    if config.evaluate.enabled and config.evaluate.compare == "dense":
        # All processes train it, like the joint run; its trainer ends what both share.
        del trainer
        folders["dense LoRA"] = _dense(config, prepared, tokenizer, data, done.steps, resume)
    else:
        trainer.end()
        del trainer
    if not is_main_process():
        return RunReport(config.folder, done.exported, ())
    folders["compact"] = export_folder(config)
    results = _evaluate(config, folders, data) if config.evaluate.enabled else ()
    facts = _facts(config, prepared, data, done)
    write_reports(config.folder, facts | {"conversational": bool(tokenizer.chat_template)})
    _closing(config, results)
    return RunReport(config.folder, done.exported, tuple(results))


def train(
    config: RunConfig,
    prepared: PreparedModel,
    tokenizer: Any,
    data: DataBundle,
    prune: PruneConfig | None,
    output_dir: Path,
    *,
    resume: bool,
) -> PruneTuneTrainer:
    """Builds the trainer and trains (or goes on, or finds that all steps are done).

    Args:
        prune: the joint settings; None: the plain LoRA run of as many steps.
    """
    steps = run_steps(config.train, prune, len(data.train), int(os.environ.get("WORLD_SIZE", "1")))
    if prune is not None:
        for derived in derive(config, steps):
            note(f"{derived.name}: [bold]{derived.value}[/bold] ({derived.reason})")
    watched = data.validation.select(range(min(WATCHED_ROWS, len(data.validation))))
    # Made before the model is loaded: they tell transformers that ZeRO-3 wants only a part of each weight here.
    settings = sft_config(config, output_dir, steps)
    trainer = PruneTuneTrainer(
        model=load_for_training(prepared, config.model.dtype, quantization(config)),
        args=settings,
        train_dataset=data.train,
        eval_dataset=watched,
        processing_class=tokenizer,
        peft_config=lora_config(config),
        prune=prune,
        dtype=config.export.dtype,
        evaluate_at_freeze=True,
        metrics_file=config.folder / METRICS if prune is not None else None,
        select=config.selection(),
        selection_file=config.folder / SELECTION,
    )
    if prune is not None:
        shapes = trainer.planner.candidates
        note(f"budget {trainer.planner.budget.show()}: {len(shapes)} legal shape(s), such as")
        for shape in sorted(shapes, reverse=True)[:3]:
            note(f"  {shape} ({describe_kept(trainer.dense, shape)})")
    # A run that was killed before its first checkpoint was whole starts anew.
    begun = newest(output_dir, output_dir / FREEZE) is not None
    trainer.train(resume_from_checkpoint=True if resume and begun else None)
    if prune is not None and trainer.accelerator.is_main_process:
        assert trainer.plan is not None
        trainer.plan.save(config.folder / "plan.json")
    return trainer


def _export(
    config: RunConfig, trainer: PruneTuneTrainer, tokenizer: Any, data: DataBundle, resume: bool
) -> ExportedModel | None:
    if not config.delta.keeps_all:
        trainer.whole_model()
    pruned = is_main_process() and not config.delta.keeps_all
    return trainer.export(
        export_folder(config),
        deltas=keep_part(config, trainer, tokenizer, data) if pruned else {},
        dtype=config.export.dtype,
        shard_size=config.export.shard_size,
        verify=config.export.verify,
        base=config.export.base,
        replace=resume,
    )


def _dense(
    config: RunConfig, prepared: PreparedModel, tokenizer: Any, data: DataBundle, steps: int, resume: bool
) -> Path:
    """Trains and exports the plain LoRA run with the same seed, as many steps, and all the rows."""
    folder = config.folder / "dense"
    note(f"evaluate.compare dense: training the plain LoRA run, {steps} steps")
    everything = config.data.model_copy(update={"samples": SampleConfig(), "tokens": TokenConfig()})
    same_steps = config.train.model_copy(update={"max_steps": steps})
    plain = config.model_copy(update={"train": same_steps, "data": everything})
    trainer = train(plain, prepared, tokenizer, data, None, folder / TRAIN, resume=resume)
    trainer.export(folder / "model", dtype=config.export.dtype, base=config.export.base, verify=False, replace=True)
    trainer.end()
    return folder / "model"


def _evaluate(config: RunConfig, folders: dict[str, Path], data: DataBundle) -> list[EvalResult]:
    rows = data.validation.select(range(min(config.evaluate.rows, len(data.validation))))
    settings = eval_settings(config)
    with loading_whole():
        results = compare(folders, rows, data.general_text, speed=config.evaluate.speed, settings=settings)
    save_evaluation(config.folder / "evaluation.json", results, settings)
    return results


def eval_settings(config: RunConfig) -> EvalSettings:
    """How a run's models are measured."""
    return EvalSettings(
        max_length=config.train.max_length,
        batch_size=config.train.batch_size,
        completion_only=config.train.completion_only,
        assistant_only=config.train.assistant_only,
        general_tokens=config.evaluate.general_tokens,
        answer=config.evaluate.answer,
        answer_rows=config.evaluate.answer_rows,
        answer_tokens=config.evaluate.answer_tokens,
    )


def _facts(config: RunConfig, prepared: PreparedModel, data: DataBundle, done: Done) -> dict[str, Any]:
    """What the reports cannot read from the run folder."""
    papers = [MASKS.get(config.mask.method).paper, COMPENSATIONS.get(config.compensation.method).paper]
    papers += [DELTAS.get(config.delta.method).paper, RANKS.get(config.lora.ranks.method).paper]
    samples, tokens = config.data.samples.method, config.data.tokens.method
    papers += [SAMPLES.get(samples).paper] if samples else []
    papers += [TOKENS.get(tokens).paper] if tokens else []
    return {
        "base_model": config.model.name,
        "base_licence": prepared.licence,
        "data": data.description,
        "data_licence": PYDOCS_LICENCE if config.data.train == PYDOCS else "",
        "budget": done.budget,
        "mask": config.mask.method,
        "compensation": config.compensation.method,
        "ranks": config.lora.ranks.method if config.lora.ranks.method != "keep" else None,
        "samples": samples,
        "papers": list(dict.fromkeys(paper for paper in papers if paper)),
        "steps": done.steps,
        "seconds": done.seconds,
        "verification": done.exported.verification if done.exported else {},
        "merged_onto": _merged_onto(done.exported),
        "warnings": data.facts.get("warnings", []),
        "export": str(export_folder(config)),
    }


def _merged_onto(exported: ExportedModel | None) -> str:
    """What the adapters of a quantised base were merged onto."""
    return "" if exported is None else read_json(exported.folder / METADATA_FILE)["metadata"].get("merged_onto", "")


def _closing(config: RunConfig, results: tuple[EvalResult, ...] | list[EvalResult]) -> None:
    if results:
        console().print(before_after_table(results))
    note(f"compact model: [bold]{export_folder(config)}[/bold] (stock transformers opens it)")
    note(f"report: {config.folder / 'report.html'}   model card: {config.folder / 'README.md'}")
    note(f"try it: prunetune chat {export_folder(config)}")
