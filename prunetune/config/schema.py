"""Every setting of a run, with its default and what it means. Help texts on the command line come from here.

Settings of a single method (a mask's decay, say) are not listed here: the method declares them itself, and
``mask.decay: 0.9`` reaches it through the extra keys that the method sections accept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from prunetune.core.sizes import parse_bytes, parse_count, parse_fraction


def _bytes(value: Any) -> int:
    """A size as a person types it, or the plain number of bytes of a resolved configuration."""
    return value if type(value) is int else parse_bytes(value)


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}; escape its special characters") from error
    return value


Fraction = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0.0, le=1.0)]
Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
Pattern = Annotated[str, AfterValidator(_pattern)]
UnitKind = Literal["mlp_channels", "kv_groups", "query_heads", "layers", "hidden"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A group of settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodSection(Section):
    """A section that names a method and carries that method's own options as extra keys."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """``mask: random`` is ``mask: {method: random}``."""
        return {"method": value} if isinstance(value, str) else value

    def options(self) -> dict[str, Any]:
        """The keys that are the method's own; the method checks them."""
        return dict(self.model_extra or {})


class ModelConfig(Section):
    """The base model."""

    name: str = Field(description="local folder, Hugging Face Hub id, or a short name such as smollm2-135m")
    revision: str | None = Field(None, description="commit, tag or branch on the hub")
    dtype: Dtype = Field("float32", description="the frozen base weights' dtype while training")
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        None, description="keep the base's linear weights in 4 or 8 bit while training (QLoRA); needs bitsandbytes"
    )


class SampleConfig(MethodSection):
    """Which rows of an optimizer step are trained on, decided while training."""

    method: str | None = Field(None, description="see `prunetune list samples`; none: every row")
    kept: Fraction = Field(1.0, gt=0, description="fraction of each optimizer step's rows that stays, at least one row")


class TokenConfig(MethodSection):
    """Which target tokens of the rows that stay are in the loss; the others remain as context."""

    method: str | None = Field(None, description="see `prunetune list tokens`; none: every target token")
    kept: Fraction = Field(1.0, gt=0, description="fraction of the kept rows' target tokens that stays")
    scope: Literal["sample", "all"] = Field("all", description="rank within each row, or over an optimizer step's rows")
    floor: Fraction = Field(0.1, description="every row keeps at least this fraction of its targets, and one")
    final_answer: Pattern | None = Field(
        None, description="regular expression where final answers begin; from its last match on nothing is dropped"
    )


class OnlineConfig(Section):
    """When rows and tokens are chosen while training."""

    warmup: Fraction = Field(0.0, description="share of the steps at the start that train on everything")
    anneal: Fraction = Field(0.0, description="share of the steps at the end that train on everything")
    rescore_after: int = Field(
        0, ge=0, description="optimizer steps for which a row's statistics are used again; 0: scored anew every step"
    )

    @model_validator(mode="after")
    def _leaves_steps(self) -> OnlineConfig:
        if self.warmup + self.anneal > 1:
            raise ValueError(
                f"data.online.warmup ({self.warmup:.0%}) and data.online.anneal ({self.anneal:.0%}) add up to more "
                "than all the steps; lower one of them"
            )
        return self


class SelectionConfig(Section):
    """What PruneTuneTrainer needs to know to choose rows and tokens while it trains.

    Example:
        >>> SelectionConfig(samples={"method": "q_tuning", "kept": "25%"}).samples.kept
        0.25
    """

    samples: SampleConfig = SampleConfig()
    tokens: TokenConfig = TokenConfig()
    online: OnlineConfig = OnlineConfig()
    seed: int = 0


class DataConfig(Section):
    """Where the rows come from, and which of them are trained on."""

    train: str = Field(
        "pydocs", description="pydocs, a .jsonl/.json/.csv/.parquet file, a saved datasets folder, or a hub id"
    )
    validation: str | None = Field(
        None, description="held-out rows in the same forms; split off from train if not given"
    )
    validation_fraction: Fraction = Field(0.05, description="share split off when no validation is given")
    validation_rows: int = Field(400, ge=1, description="at most so many held-out rows")
    max_rows: int | None = Field(None, ge=1, description="use only so many training rows")
    format: Literal["auto", "prompt_completion", "messages", "alpaca", "text", "tokens"] = Field(
        "auto", description="how rows are laid out; auto recognises it and prints what it saw"
    )
    general_text: str | None = Field(
        None, description="text file for the general perplexity; default: package descriptions installed here"
    )
    samples: SampleConfig = SampleConfig()
    tokens: TokenConfig = TokenConfig()
    online: OnlineConfig = OnlineConfig()


class TargetConfig(Section):
    """How small the model becomes: exactly one of kept, params, size."""

    kept: Fraction | None = Field(None, description="fraction of the decoder's linear parameters that stays, e.g. 60%")
    params: Count | None = Field(None, description="total parameters, e.g. 90M")
    size: Bytes | None = Field(None, description="bytes of the exported weights, e.g. 180MB")
    units: tuple[UnitKind, ...] = Field(
        ("mlp_channels", "kv_groups"), description="the structures that the planner may remove"
    )
    align: int = Field(64, ge=1, description="MLP widths, and a pruned hidden width, are multiples of this")

    @model_validator(mode="before")
    @classmethod
    def _from_dial(cls, value: Any) -> Any:
        """``target: 60%`` is ``target: {kept: 60%}``."""
        return value if isinstance(value, dict | TargetConfig) else {"kept": value}

    @model_validator(mode="after")
    def _one_budget(self) -> TargetConfig:
        given = [name for name in ("kept", "params", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"set exactly one of target.kept, target.params, target.size; set now: {', '.join(given) or 'none'}"
            )
        if not self.units:
            raise ValueError("target.units is empty: nothing could be removed; name at least mlp_channels")
        return self


class MaskConfig(MethodSection):
    """The method that ranks units while the adapters learn."""

    method: str = Field("saliency", description="see `prunetune list masks`")


class CompensationConfig(MethodSection):
    """What the weights that stay do about the ones that leave, at the freeze."""

    method: str = Field("refit", description="see `prunetune list compensation`")


class DeltaConfig(MethodSection):
    """How much of what the adapters learnt is kept when they are merged, and how training makes ready for that."""

    method: str = Field("identity", description="prunes what was learnt at the export; see `prunetune list deltas`")
    drop: Fraction | None = Field(None, description="share of it that is dropped; default: the method's own")
    regularize: Literal["none", "l2", "l1"] = Field(
        "none",
        description="pulls the change of every weight toward 0: l2 for random dropping, l1 for keeping the largest",
    )
    strength: float = Field(1e-3, ge=0, description="of regularize, relative to the optimizer's own steps")
    train_drop: Fraction = Field(
        0.0, lt=1, description="share of A that is dropped anew in every step of the recover phase, ramped up"
    )
    train_drop_unit: Literal["columns", "entries"] = Field(
        "columns", description="what train_drop drops: input channels of A, or single entries"
    )

    def method_options(self) -> dict[str, Any]:
        """What the method is built with."""
        return self.options() | ({} if self.drop is None else {"drop": self.drop})

    @property
    def keeps_all(self) -> bool:
        """Whether everything that was learnt is merged."""
        return self.method == "identity" or self.drop == 0


class DistillConfig(Section):
    """Following the open model while gates close: the same network with all gates open is the teacher."""

    weight: Fraction = Field(0.0, description="share of the search's loss that is KL(open || gated); 0: off")
    temperature: float = Field(1.0, gt=0, description="both models' logits are divided by it")


class PhaseConfig(Section):
    """Shares of the optimizer steps; recover gets what is left."""

    warmup: Fraction = Field(0.05, description="all gates open")
    search: Fraction = Field(0.20, description="gates move toward the budget")

    @model_validator(mode="after")
    def _leaves_recovery(self) -> PhaseConfig:
        if self.warmup + self.search > 1:
            raise ValueError(
                f"phases.warmup ({self.warmup:.0%}) and phases.search ({self.search:.0%}) add up to more than all the "
                "steps; leave at least 25% for recover"
            )
        return self


class RanksConfig(MethodSection):
    """How many ranks every adapter has from the freeze on."""

    method: str = Field("keep", description="see `prunetune list ranks`")


class LoraSection(Section):
    """The adapters that learn the domain."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = Field("all-linear", description="module names, or all-linear")
    use_rslora: bool = False
    ranks: RanksConfig = RanksConfig()


class TrainSection(Section):
    """The training loop. Any other field of trl.SFTConfig can be set under ``sft``."""

    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: from epochs")
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1, description="rows per device and micro-batch")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step")
    learning_rate: float = Field(1e-3, gt=0)
    scheduler: str = Field(
        "warmup_stable_decay", description="default: full rate until the freeze and half of the steps, then to zero"
    )
    warmup_steps: float = Field(0.05, ge=0, description="steps, or a share of all steps if below 1")
    max_length: int = Field(512, ge=8, description="tokens; longer rows are cut at the end")
    packing: bool = False
    bf16: bool = Field(True, description="bfloat16 arithmetic (weights keep model.dtype)")
    activation_checkpointing: bool = Field(False, description="recompute activations to save memory")
    completion_only: bool | None = Field(None, description="loss on completions only; default: if rows have them")
    assistant_only: bool = False
    log_every: int = Field(1, ge=1)
    save_every: int = Field(0, ge=0, description="checkpoint every so many steps; 0: a tenth of the run")
    eval_every: int = Field(0, ge=0, description="validation every so many steps; 0: at the freeze and the end")
    keep_checkpoints: int = Field(2, ge=1)
    report_to: tuple[str, ...] = Field((), description="trackers: wandb, tensorboard, mlflow, ...")
    sft: dict[str, Any] = Field(default_factory=dict, description="any further field of trl.SFTConfig")


class ExportSection(Section):
    """The folder that comes out."""

    dtype: Dtype = Field("bfloat16", description="dtype of the exported weights")
    folder: Path | None = Field(None, description="default: <run folder>/compact")
    shard_size: Bytes = Field(5 * 10**9, description="a weights file is at most this large")
    base: Literal["trained", "source"] = Field(
        "trained",
        description="what a quantised run's adapters are merged onto: the (dequantised) weights that they were trained "
        "with, or the original ones",
    )
    verify: bool = Field(True, description="reload with stock transformers in a fresh process and compare")


class EvaluateSection(Section):
    """The before/after table."""

    enabled: bool = True
    rows: int = Field(200, ge=1, description="held-out rows for the domain perplexity")
    general_tokens: int = Field(8192, ge=128, description="tokens of general text")
    speed: bool = Field(True, description="measure prefill and decode speed")
    answer: Pattern | None = Field(
        None, description="regular expression with a group for the final answer; generated answers are then compared"
    )
    answer_rows: int = Field(100, ge=1, description="held-out rows that are answered; only with answer")
    answer_tokens: int = Field(256, ge=1, description="an answer is at most this long; only with answer")
    compare: Literal["base", "dense"] = Field(
        "base", description="dense: also train the plain LoRA run with the same steps, to show what pruning cost"
    )


class RunConfig(Section):
    """One run: data, budget, training, export, evaluation."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    target: TargetConfig
    mask: MaskConfig = MaskConfig()
    compensation: CompensationConfig = CompensationConfig()
    distill: DistillConfig = DistillConfig()
    delta: DeltaConfig = DeltaConfig()
    phases: PhaseConfig = PhaseConfig()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    evaluate: EvaluateSection = EvaluateSection()
    folder: Path = Field(Path("runs/run"), description="the run folder")
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _model_from_name(cls, value: Any) -> Any:
        """``model: smollm2-135m`` is ``model: {name: smollm2-135m}``."""
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            return {**value, "model": {"name": value["model"]}}
        return value

    def prune(self) -> PruneConfig:
        """The part that PruneTuneTrainer takes."""
        parts = {name: getattr(self, name) for name in PruneConfig.model_fields if name != "ranks"}
        return PruneConfig(**parts, ranks=self.lora.ranks)

    def selection(self) -> SelectionConfig | None:
        """The choice of rows and tokens that PruneTuneTrainer takes; None: everything is trained on."""
        data = self.data
        if data.samples.method is None and data.tokens.method is None:
            return None
        return SelectionConfig(samples=data.samples, tokens=data.tokens, online=data.online, seed=self.seed)


class PruneConfig(Section):
    """What PruneTuneTrainer needs to know beside TRL's and PEFT's own configs.

    Example:
        >>> PruneConfig(target="60%", mask="saliency").target.kept
        0.6
    """

    target: TargetConfig
    mask: MaskConfig = MaskConfig()
    compensation: CompensationConfig = CompensationConfig()
    distill: DistillConfig = DistillConfig()
    delta: DeltaConfig = DeltaConfig()
    phases: PhaseConfig = PhaseConfig()
    ranks: RanksConfig = RanksConfig()
    seed: int = 0
