"""Exporting from a run folder: again, in another dtype, or to another budget from the same scores."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from safetensors.torch import load_file

from prunetune.config.schema import RunConfig, TargetConfig
from prunetune.core.console import note, warn
from prunetune.core.errors import ConfigError, DataError, Problem
from prunetune.core.files import read_json
from prunetune.core.records import ExportedModel, PreparedModel
from prunetune.data.load import load_bundle
from prunetune.export.changed import with_deltas
from prunetune.export.write import export_model
from prunetune.model.architecture import describe
from prunetune.model.deltas import Delta
from prunetune.model.plan import Plan
from prunetune.model.resolve import resolve_model
from prunetune.model.source import SourceWeights
from prunetune.model.surgery import Surgery
from prunetune.pipeline.delta_stage import DELTA_FILE, DeltaStage, search_rows
from prunetune.pipeline.folder import read_config
from prunetune.pipeline.loading import TRAIN, load_for_training, load_tokenizer, load_trained
from prunetune.pipeline.quiet import quiet_libraries
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.train.freeze import FREEZE, SCORES_FILE, load_folds, load_updates
from prunetune.train.settings import quantization, sft_config


def export_run(
    folder: Path,
    out: Path,
    *,
    target: str | None = None,
    dtype: str | None = None,
    base: Literal["trained", "source"] | None = None,
    replace: bool = False,
) -> ExportedModel:
    """Exports the model of a run folder.

    Args:
        folder: a run folder.
        out: where the model goes.
        target: another budget, e.g. ``80%``; default: the run's plan, with its recover phase.
        dtype: of the exported weights; default: the run's.
        base: what a quantised run's adapters are merged onto; default: as in the run.
        replace: overwrite ``out``.

    Returns:
        The export and its verification.

    Raises:
        PrunetuneError: the run has nothing to export yet, the target is impossible, or the export failed.
    """
    quiet_libraries()
    config = read_config(Path(folder))
    prepared = resolve_model(config.model.name, config.model.revision)
    dtype, base = dtype or config.export.dtype, base or config.export.base
    if base == "source" and not config.model.quantize:
        raise ConfigError([Problem("source differs for a quantised run only, and this one was not", "--base")])
    if target is not None:
        return _retarget(config, prepared, Path(out), target, dtype, base, replace)
    model, plan = load_trained(Path(folder), prepared, config.model.dtype, quantization(config))
    source = None
    if base == "source":
        freeze, surgery = config.folder / TRAIN / FREEZE, Surgery(describe(prepared.config), plan)
        source = SourceWeights(model, surgery, load_updates(freeze))
    metadata, tokenizer = {"plan": plan.digest()}, load_tokenizer(prepared)
    with with_deltas(model, _deltas(config, prepared, model, tokenizer, plan)):
        return export_model(
            model, tokenizer, Path(out), dtype=dtype, plan=plan, metadata=metadata, replace=replace, source=source
        )


def _deltas(config: RunConfig, prepared: PreparedModel, model: Any, tokenizer: Any, plan: Plan) -> dict[str, Delta]:
    """What the run left of its deltas; searched now if it was stopped before it came to that."""
    if config.delta.keeps_all:
        return {}
    data = load_bundle(config.data, tokenizer=tokenizer, max_length=config.train.max_length, seed=config.seed)
    rows, _ = search_rows(config, tokenizer, data)
    surgery = Surgery(describe(prepared.config), plan)
    stage = DeltaStage(model, tokenizer, surgery, config.delta, config.seed, rows)
    if (config.folder / DELTA_FILE).is_file():
        facts = read_json(config.folder / DELTA_FILE)
        return stage.pruned(stage.build(facts["options"]), facts["q"])
    return stage.pruned(stage.build(stage.settle().options))


def _retarget(
    config: RunConfig,
    prepared: PreparedModel,
    out: Path,
    target: str,
    dtype: str,
    base: Literal["trained", "source"],
    replace: bool,
) -> ExportedModel:
    """Cuts the model of the freeze to another budget: same scores, same adapters, compensation, no recover phase."""
    freeze = config.folder / TRAIN / FREEZE
    if not freeze.is_dir():
        raise DataError(f"{config.folder} has no freeze yet, so there are no scores to make another plan from")
    wanted = TargetConfig(kept=target, units=config.target.units, align=config.target.align)
    tokenizer = load_tokenizer(prepared)
    data = load_bundle(config.data, tokenizer=tokenizer, max_length=config.train.max_length, seed=config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PruneTuneTrainer(
            model=PeftModel.from_pretrained(
                load_for_training(prepared, config.model.dtype, quantization(config)), freeze / "adapter"
            ),
            args=sft_config(config, Path(scratch), 1),
            train_dataset=data.train,
            processing_class=tokenizer,
            prune=config.prune().model_copy(update={"target": wanted}),
            dtype=dtype,
        )
        plan = trainer.cut_from_scores(load_file(freeze / SCORES_FILE), load_folds(freeze))
        note(f"plan for {target} from the run's scores: {plan.origin['shape']}")
        warn(
            "no recover phase follows this cut. To train the smaller model on: `prunetune train CONFIG "
            f"target.kept={target} mask.method=static mask.plan={out / 'plan.json'}`"
        )
        exported = trainer.export(out, dtype=dtype, base=base, replace=replace)
    assert exported is not None
    return exported
