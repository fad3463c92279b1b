"""Rules between settings that need neither the model nor the data; each says what to set instead.

``check`` returns faults (the run is refused); ``cautions`` returns what works but may not be meant.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from prunetune.config.presets import export_folder, learning_rate_warmup, phase_steps
from prunetune.config.schema import RunConfig
from prunetune.config.selection_rules import run_faults, selection_cautions
from prunetune.config.upstream import OWN_SETTING, scheduler_names, sft_fields
from prunetune.core.errors import Problem, suggest

QUANTIZE_INSTALL = "pip install 'bitsandbytes>=0.50,<0.51'"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# What a tracker's name in report_to needs installed; other names are left to transformers.
_TRACKERS = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
    "swanlab": "swanlab",
    "clearml": "clearml",
}


def check(config: RunConfig) -> list[Problem]:
    """Every combination in ``config`` that cannot work; ``field`` is the dotted key to change."""
    rules = (
        *(_target, _data, _data_files, run_faults, _loss, _steps, _further_sft, _trackers),
        *(_lora, _distill, _delta, _quantized, _folders, _evaluate),
    )
    return [Problem(message, field=field) for rule in rules for field, message in rule(config)]


Finding = tuple[str, str]


def _target(config: RunConfig) -> Iterator[Finding]:
    target = config.target
    if target.kept == 0:
        yield "target.kept", "0% would leave no decoder; keep something, for example 60%"
    repeated = sorted({kind for kind in target.units if target.units.count(kind) > 1})
    if repeated:
        yield "target.units", f"names {', '.join(repeated)} twice; name each kind once"
    if target.align != 64 and not {"mlp_channels", "hidden"} & set(target.units):
        yield (
            "target.align",
            f"{target.align} rounds MLP and hidden widths, but target.units has neither mlp_channels nor hidden; add "
            "one, or remove this",
        )


def _data(config: RunConfig) -> Iterator[Finding]:
    data = config.data
    if data.validation is None and not 0 < data.validation_fraction < 1:
        yield (
            "data.validation_fraction",
            f"{data.validation_fraction:.0%} leaves nothing to {'train' if data.validation_fraction else 'validate'} "
            "on; set a share such as 5%, or give held-out rows in data.validation",
        )
    if data.validation is not None and data.validation == data.train:
        yield (
            "data.validation",
            f"is the training data ({data.train}), so it would measure memory; give other rows, "
            "or remove it and a share of the training rows is held out",
        )
    if data.validation is not None and data.validation_fraction != 0.05:
        yield (
            "data.validation_fraction",
            "is not used when data.validation gives the held-out rows; remove one of the two",
        )
    if data.train == "pydocs" and data.format not in ("auto", "prompt_completion"):
        yield (
            "data.format",
            f"is {data.format}, but pydocs rows are prompt and completion; remove data.format",
        )


def _data_files(config: RunConfig) -> Iterator[Finding]:
    files = (("data.train", config.data.train), ("data.validation", config.data.validation))
    for field, name in files:
        if name and (name.lower().endswith(DATA_SUFFIXES) or name.startswith(("/", "./", "../", "~"))):
            yield from _must_exist(field, name)
    if config.data.general_text is not None:
        yield from _must_exist("data.general_text", config.data.general_text)


def _must_exist(field: str, name: str) -> Iterator[Finding]:
    path = Path(name).expanduser()
    if path.exists():
        return
    if not path.parent.is_dir():
        yield (
            field,
            f"{name} does not exist (there is no folder {path.parent}); paths start from {Path.cwd()}",
        )
        return
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else f"paths start from {Path.cwd()}"
    yield field, f"{name} does not exist; {hint}"


def _loss(config: RunConfig) -> Iterator[Finding]:
    train, layout = config.train, config.data.format
    if train.assistant_only and layout not in ("auto", "messages"):
        yield (
            "train.assistant_only",
            f"needs rows with messages, but data.format is {layout}; change it, or use completion_only",
        )
    if train.assistant_only and config.data.train == "pydocs":
        yield (
            "train.assistant_only",
            "needs rows with messages; pydocs has prompt and completion: use train.completion_only",
        )
    if train.completion_only and layout == "text":
        yield (
            "train.completion_only",
            "needs rows with a completion, but data.format is text; remove one of the two",
        )


def _steps(config: RunConfig) -> Iterator[Finding]:
    train = config.train
    known = scheduler_names()
    if known and train.scheduler not in known:
        yield "train.scheduler", f"unknown schedule {train.scheduler!r}; {suggest(train.scheduler, known)}"
    if train.warmup_steps >= 1 and train.warmup_steps != int(train.warmup_steps):
        yield "train.warmup_steps", f"{train.warmup_steps:g} is neither whole steps nor a share below 1"
    if train.max_steps == 0:
        yield (
            "train.max_steps",
            "0 trains nothing; set a number of steps, or -1 to count them from train.epochs",
        )
    if 0 < train.max_steps < 3:
        yield (
            "train.max_steps",
            f"{train.max_steps} is too few for warm-up, search and recover; set at least 3",
        )
    if train.max_steps > 0 and train.warmup_steps >= train.max_steps:
        yield (
            "train.warmup_steps",
            f"{train.warmup_steps:g} is not below train.max_steps {train.max_steps}: the learning rate would never "
            "reach its value; set a share such as 0.05",
        )


def _further_sft(config: RunConfig) -> Iterator[Finding]:
    known = sft_fields()
    for name in config.train.sft:
        if name in OWN_SETTING:
            yield f"train.sft.{name}", f"is set by {OWN_SETTING[name]}; set that instead"
        elif known and name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "see trl's SFTConfig for the list"
            yield f"train.sft.{name}", f"is not a field of trl.SFTConfig; {hint}"


def _trackers(config: RunConfig) -> Iterator[Finding]:
    for name in config.train.report_to:
        module = _TRACKERS.get(name)
        if module and importlib.util.find_spec(module) is None:
            yield "train.report_to", f"{name} is not installed; pip install {module}, or remove it"


def _lora(config: RunConfig) -> Iterator[Finding]:
    targets = config.lora.targets
    if not targets:
        yield "lora.targets", "is empty, so nothing could learn; write all-linear or module names"
    if isinstance(targets, str) and "," in targets:
        names = ", ".join(name.strip() for name in targets.split(","))
        yield "lora.targets", f"several names are a list: [{names}]"


def _delta(config: RunConfig) -> Iterator[Finding]:
    delta = config.delta
    if delta.method == "identity" and delta.drop is not None:
        yield "delta.drop", "is not used, because delta.method keeps everything; set it to darex_q, or remove this"
    for field, user, off in (("strength", "regularize", "none"), ("train_drop_unit", "train_drop", 0.0)):
        if getattr(delta, user) == off and getattr(delta, field) != type(delta).model_fields[field].default:
            yield f"delta.{field}", f"is not used without delta.{user}; set that, or remove this"


def _distill(config: RunConfig) -> Iterator[Finding]:
    if config.distill.weight == 0 and config.distill.temperature != 1:
        yield "distill.temperature", "is not used without distill.weight; set that, 0.5 for example, or remove this"


def _quantized(config: RunConfig) -> Iterator[Finding]:
    kind = config.model.quantize
    if kind and importlib.util.find_spec("bitsandbytes") is None:
        yield "model.quantize", f"{kind} needs bitsandbytes; {QUANTIZE_INSTALL}, or remove it"
    if config.export.base == "source" and not kind:
        yield "export.base", "is source, which differs for a quantised base only; set model.quantize, or remove it"


def _folders(config: RunConfig) -> Iterator[Finding]:
    run, out = config.folder.resolve(), export_folder(config).resolve()
    base = Path(config.model.name).expanduser()
    if config.folder.is_file():
        yield "folder", f"{config.folder} is a file; name a folder"
    if out == run or out in run.parents:
        yield (
            "export.folder",
            f"{config.export.folder} is the run folder or around it, and would be replaced; name another",
        )
    elif out == run / "train" or run / "train" in out.parents:
        yield (
            "export.folder",
            f"{config.export.folder} lies among the checkpoints of {config.folder / 'train'}; "
            f"use {config.folder / 'compact'}",
        )
    if base.is_dir():
        inside = base.resolve()
        for field, path in (("folder", run), ("export.folder", out)):
            if path == inside:
                yield field, f"{path} is the base model's folder, which is never written to; name another"


def _evaluate(config: RunConfig) -> Iterator[Finding]:
    if config.evaluate.compare == "dense" and not config.evaluate.enabled:
        yield (
            "evaluate.compare",
            "dense trains a second model for the table that evaluate.enabled: false leaves out; remove one",
        )


def cautions(config: RunConfig, steps: int | None = None) -> list[str]:
    """What works but may not be meant; one sentence each.

    Args:
        steps: optimizer steps of the run, if they are known.
    """
    found = [*_general_cautions(config), *selection_cautions(config)]
    return found + (list(_step_cautions(config, steps)) if steps else [])


def _general_cautions(config: RunConfig) -> Iterator[str]:
    target, phases, train = config.target, config.phases, config.train
    recover = 1 - phases.warmup - phases.search
    if target.kept == 1:
        yield "target.kept is 100%: nothing is removed, this is a plain LoRA run"
    elif target.kept is not None and target.kept < 0.3:
        yield f"target.kept is {target.kept:.0%}: below about 30% little of the model's ability survives"
    if recover < 0.25:
        yield f"phases leave {recover:.0%} of the steps to recover; at least 25% is advised"
    if config.model.dtype == "float16":
        yield "model.dtype is float16, whose range overflows easily in training; bfloat16 has the same size"
    if train.max_steps > 0 and train.epochs != 1.0:
        yield "train.epochs is not used, because train.max_steps is set"
    if train.packing and train.completion_only is False:
        yield "train.packing joins rows, and train.completion_only is false: prompts are learnt like answers"
    if config.evaluate.enabled and config.evaluate.rows > config.data.validation_rows:
        yield (
            f"evaluate.rows is {config.evaluate.rows}, but at most data.validation_rows "
            f"{config.data.validation_rows} rows are held out"
        )


def _step_cautions(config: RunConfig, steps: int) -> Iterator[str]:
    train, parts = config.train, phase_steps(config.phases, steps)
    if parts.search < 10:
        yield f"search has {parts.search} of {steps} steps; scores of fewer than about 10 steps are noisy"
    if train.save_every > steps:
        yield f"train.save_every {train.save_every} is beyond the last step {steps}; freeze and end are saved"
    if train.eval_every > steps:
        yield f"train.eval_every {train.eval_every} is beyond the last step {steps}: no validation on the way"
    if learning_rate_warmup(train, steps) > parts.freeze:
        yield f"the learning rate still rises at the freeze, step {parts.freeze}; lower train.warmup_steps"
