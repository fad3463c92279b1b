"""Exporting from a run folder: again, in another dtype, or to another budget from the same scores."""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file

from prunetune.config.schema import RunConfig, TargetConfig
from prunetune.core.console import note, warn
from prunetune.core.errors import DataError
from prunetune.core.records import ExportedModel, PreparedModel
from prunetune.data.load import load_bundle
from prunetune.export.write import export_model
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.folder import read_config
from prunetune.pipeline.loading import TRAIN, load_base, load_tokenizer, load_trained
from prunetune.pipeline.quiet import quiet_libraries
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.train.freeze import FREEZE, SCORES_FILE
from prunetune.train.settings import sft_config


def export_run(
    folder: Path, out: Path, *, target: str | None = None, dtype: str | None = None, replace: bool = False
) -> ExportedModel:
    """Exports the model of a run folder.

    Args:
        folder: a run folder.
        out: where the model goes.
        target: another budget, e.g. ``80%``; default: the run's plan, with its recover phase.
        dtype: of the exported weights; default: the run's.
        replace: overwrite ``out``.

    Returns:
        The export and its verification.

    Raises:
        PrunetuneError: the run has nothing to export yet, the target is impossible, or the export failed.
    """
    quiet_libraries()
    config = read_config(Path(folder))
    prepared = resolve_model(config.model.name, config.model.revision)
    dtype = dtype or config.export.dtype
    if target is not None:
        return _retarget(config, prepared, Path(out), target, dtype, replace)
    model, plan = load_trained(Path(folder), prepared, config.model.dtype)
    metadata = {"plan": plan.digest()}
    return export_model(
        model, load_tokenizer(prepared), Path(out), dtype=dtype, plan=plan, metadata=metadata, replace=replace
    )


def _retarget(
    config: RunConfig, prepared: PreparedModel, out: Path, target: str, dtype: str, replace: bool
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
            model=PeftModel.from_pretrained(load_base(prepared, config.model.dtype), freeze / "adapter"),
            args=sft_config(config, Path(scratch), 1),
            train_dataset=data.train,
            processing_class=tokenizer,
            prune=config.prune().model_copy(update={"target": wanted}),
            dtype=dtype,
        )
        plan = trainer.cut_from_scores(load_file(freeze / SCORES_FILE))
        note(f"plan for {target} from the run's scores: {plan.origin['shape']}")
        warn(
            "no recover phase follows this cut. To train the smaller model on: `prunetune train CONFIG "
            f"target.kept={target} mask.method=static mask.plan={out / 'plan.json'}`"
        )
        exported = trainer.export(out, dtype=dtype, replace=replace)
    assert exported is not None
    return exported
