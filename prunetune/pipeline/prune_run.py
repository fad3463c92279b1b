"""`prunetune prune`: one shot, no training. Calibrate, score, allocate, compensate, write, prove.

The model is never loaded whole unless the score or the allocation asks for it: layers are read one at a time, for
calibration and for scoring, and the pruned folder is written from the base's shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from prunetune.core.console import console, note
from prunetune.core.errors import ConfigError, Problem, UnsupportedModelError
from prunetune.core.files import new_file
from prunetune.core.records import ExportedModel
from prunetune.export.pruned import PrunedExport
from prunetune.export.write import refuse_existing
from prunetune.methods.allocation import uniform_widths
from prunetune.methods.allocation._problem import problem_of
from prunetune.methods.scores import (
    LayerFacts,
    LayerScore,
    ModelFacts,
    ModelScore,
    Score,
    ScoreContext,
    build_score,
    consumer,
)
from prunetune.model.architecture import describe
from prunetune.model.budget import Budget, Shape, decoder_params, describe_kept, full_shape
from prunetune.model.layer_statistics import CONSUMERS
from prunetune.model.layer_stream import LayerStream, Weights
from prunetune.model.legality import bias_fields
from prunetune.model.output_judge import OutputJudge
from prunetune.model.planner import Planner
from prunetune.model.resolve import resolve_model
from prunetune.model.sequential import Calibration, batches_of
from prunetune.model.shards import ShardReader
from prunetune.model.surgery import Surgery
from prunetune.model.units import LAYERS_SITE
from prunetune.pipeline.calibration_rows import CalibrationRows
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.prune_request import PruneRequest
from prunetune.pipeline.quiet import quiet_libraries
from prunetune.pipeline.remembered_judge import RememberedJudge

# Tokens of one forward pass through one layer.
BATCH_TOKENS = 4096
NOTHING = "none"
# Keys of config.json that change no number of a forward pass in a dtype that is chosen here.
COSMETIC = frozenset({"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"})


def prune_once(request: PruneRequest) -> ExportedModel:
    """Prunes a model in one shot and writes it as a folder that stock transformers opens.

    Returns:
        The export and its verification. The folder also holds plan.json and scores.safetensors.

    Raises:
        ConfigError: settings that cannot work, all at once.
        PrunetuneError: the budget is impossible, rows are unusable, the disk is full, or the export did not verify.

    Example:
        >>> prune_once(PruneRequest("base/", Path("pruned"), TargetConfig(kept="70%"), calibration="rows.jsonl"))
        ... # doctest: +SKIP
    """
    quiet_libraries()
    problems = request.problems()
    if request.out.exists() and not request.replace:
        message = f"{request.out} exists; name another folder, or add --overwrite to replace an earlier export"
        problems.append(Problem(message, "--out"))
    if problems:
        raise ConfigError(problems)
    refuse_existing(request.out, request.replace)
    return _Pruning(_compensated(request)).run()


def _compensated(request: PruneRequest) -> PruneRequest:
    """The request, without a compensation where there is nothing to compensate."""
    if request.compensates or request.compensation == NOTHING:
        return request
    note(f"compensation {NOTHING}, not {request.compensation}: layers leave whole, so no linear loses inputs")
    options = {section: given for section, given in request.options.items() if section != "compensation"}
    return replace(request, compensation=NOTHING, options=options)


class _Pruning:
    """One pruning from request to folder."""

    def __init__(self, request: PruneRequest):
        self.request = request
        self.prepared = resolve_model(request.model)
        if "quantization_config" in self.prepared.config:
            raise UnsupportedModelError(
                f"the base {request.model} is quantised: rows cannot be cut out of it. Take the unquantised model"
            )
        self.arch = describe(self.prepared.config)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compensation, self.allocation = request.built()
        self.planner = self._planner()
        context = ScoreContext(self.arch, self.planner.sites, request.seed)
        self.score: Score = build_score(request.score, request.options.get("score", {}), context)

    def _bias_fields(self, roles: Iterable[str]) -> dict[str, Any]:
        """Config fields that give a bias to these consumers, if the compensation wants one."""
        if not self.compensation.makes_bias:
            return {}
        found: dict[str, Any] = {}
        for role in sorted(set(roles)):
            fields = bias_fields(self.arch, role)
            if fields is None:
                raise UnsupportedModelError(
                    f"compensation {self.request.compensation} adds a bias to {self.arch.family.modules[role]}, and a "
                    f"{self.arch.model_type} config cannot say one; take refit or mask_tuning, which change weights "
                    "only, or prune units elsewhere"
                )
            found |= fields
        return found

    def _planner(self) -> Planner:
        """The planner of the target; biases that are added count."""
        request, family = self.request, self.arch.family
        added = self._bias_fields(self._consumers)
        if not added:
            return Planner(self.arch, request.target, request.dtype)
        arch = replace(
            self.arch,
            attention_bias=self.arch.attention_bias or family.attention_bias in added,
            mlp_bias=self.arch.mlp_bias or family.mlp_bias in added,
        )
        return Planner(
            arch, request.target, request.dtype, Budget.from_target(self.arch, request.target, request.dtype)
        )

    def run(self) -> ExportedModel:
        """Everything, in order."""
        self._calibrate()
        scores = self._scores()
        shape, remarks = self._shape(scores)
        plan = self.planner.plan(scores, shape=shape, origin=self._origin(shape, remarks))
        for remark in remarks:
            note(remark)
        note(f"plan: {shape}, {describe_kept(self.arch, shape)}")
        # The model is not needed any more, and the check wants room.
        self.__dict__.pop("model", None)
        self.__dict__.pop("judge", None)
        surgery = Surgery(self.arch, plan)
        export = PrunedExport(
            self.prepared.folder,
            surgery,
            self._compensate,
            self._bias_fields(self._place(path)[1] for path, cut in surgery.cuts.items() if cut.columns is not None),
            self.request.dtype,
            self.request.shard_size,
            self.device,
        )
        request = self.request
        metadata = {"plan": plan.digest(), "pruned": dict(plan.origin), "base_licence": self.prepared.licence}
        return export.write(
            request.out, self.tokenizer, scores, metadata, replace=request.replace, verify=request.verify
        )

    def _origin(self, shape: Shape, remarks: Sequence[str]) -> dict[str, Any]:
        request, full = self.request, decoder_params(self.arch, full_shape(self.arch))
        return {
            "method": f"one-shot {request.score}",
            "allocation": request.allocation,
            "compensation": request.compensation,
            "options": {section: dict(options) for section, options in request.options.items()},
            "seed": request.seed,
            "decoder_kept": decoder_params(self.planner.arch, shape) / full,
            "remarks": list(remarks),
        }

    # --- what is looked at -------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.prepared)

    @cached_property
    def rows(self) -> CalibrationRows:
        request = self.request
        assert request.calibration is not None, "checked in problems()"
        return CalibrationRows(
            request.calibration,
            self.tokenizer,
            max_length=request.max_length,
            tokens=request.tokens,
            judge_tokens=request.judge_tokens,
            seed=request.seed,
        )

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def calibration(self) -> Calibration:
        """The statistics' folder, named by everything that they depend on."""
        facts = {
            "format": "prunetune-calibration-2",
            "weights": ShardReader(self.prepared.folder).digest(),
            "config": {name: value for name, value in self.prepared.config.items() if name not in COSMETIC},
            "rows": self.rows.digest(),
            "dtype": str(self.compute_dtype),
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        root = self.request.cache or self.request.out.absolute().parent / "prune-cache"
        return Calibration(root / name, self.arch, facts)

    @cached_property
    def model(self) -> Any:
        """The whole model, for what needs gradients or outputs."""
        note(f"{self.request.score} / {self.request.allocation}: loading the whole model")
        name = str(self.compute_dtype).removeprefix("torch.")
        return load_base(self.prepared, name).to(self.device).eval().requires_grad_(False)

    @cached_property
    def judge(self) -> RememberedJudge:
        def make() -> OutputJudge:
            batches = batches_of([row.input_ids for row in self.rows.judged], BATCH_TOKENS)
            return OutputJudge(self.model, self.planner.sites, batches, self.arch.family.layers)

        return RememberedJudge(make, self.calibration.folder / f"judged-{self.rows.digest_of_all()}.json")

    # --- the steps ---------------------------------------------------------------------------------------------------

    def _calibrate(self) -> None:
        """Makes the statistics that the score and the compensation read, unless they are there."""
        products = self._consumers if self.compensation.tokens else ()
        if not (products or self.compensation.makes_bias or self._measures):
            return
        if self.calibration.missing(products=products) is None:
            note(f"calibration: read from {self.calibration.folder}, no new pass")
            return
        batches = batches_of([row.input_ids for row in self.rows.draw()], BATCH_TOKENS)
        self.calibration.run(self._stream, batches, products=products)
        note(f"calibration: kept in {self.calibration.folder} for another size or score; delete it when done")

    @property
    def _consumers(self) -> list[str]:
        """Roles of the linears that may lose inputs."""
        kinds = set(self.request.target.units) - {LAYERS_SITE}
        return sorted({consumer(self.arch, kind) for kind in kinds})

    @property
    def _measures(self) -> bool:
        """Whether the score reads statistics of single layers."""
        return isinstance(self.score, LayerScore) and "activations" in self.score.needs

    def _stream(self) -> LayerStream:
        config = AutoConfig.from_pretrained(self.prepared.folder, trust_remote_code=False, local_files_only=True)
        weights = Weights(ShardReader(self.prepared.folder))
        return LayerStream(config, weights, self.device, self.compute_dtype, self.arch.family.layers)

    def _scores(self) -> dict[str, Tensor]:
        if isinstance(self.score, ModelScore):
            return self._model_scores(self.score)
        assert isinstance(self.score, LayerScore)
        weights, family = Weights(ShardReader(self.prepared.folder)), self.arch.family
        shown = f"scoring with {self.request.score}"
        for layer in track(range(self.arch.layers), shown, console=console(), transient=True):
            read = {
                role: weights.read(f"{family.layers}.{layer}.{module}.weight").float()
                for role, module in family.modules.items()
                if "weights" in self.score.needs
            }
            statistics = self.calibration.statistics(layer) if self._measures else None
            self.score.collect(LayerFacts(layer, read, statistics))
        return self.score.scores()

    def _model_scores(self, score: ModelScore) -> dict[str, Tensor]:
        """Scores that need the whole model, from the cache if they are there."""
        request = self.request
        facts = [request.score, score.options.model_dump(mode="json"), request.target.units, request.seed]
        facts += [request.tokens, self.rows.digest_of_all()]
        if score.priced:
            facts += [request.target.model_dump(mode="json"), request.allocation, request.compensation]
            facts += [self.allocation.options.model_dump(mode="json")]
            # Which budget a size in bytes means depends on the dtype.
            facts += [self.planner.budget.metric, self.planner.budget.limit, request.dtype]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        path = self.calibration.folder / f"scores-{request.score}-{name}.safetensors"
        if path.is_file():
            note(f"scores: read from {path}, no new pass")
            return load_file(path)
        score.collect(ModelFacts(self.model, self.rows.draw, lambda: self.judge, self._price))
        found = score.scores()
        with new_file(path) as temporary:
            save_file(found, temporary)
        return found

    def _price(self, scores: Mapping[str, Tensor]) -> float:
        """Divergence of the model that is cut to the budget by these scores."""
        shape, _ = self._shape(scores)
        return self.judge.divergence(self.planner.plan(scores, shape=shape).kept)

    def _shape(self, scores: Mapping[str, Tensor]) -> tuple[Shape, list[str]]:
        """The shape that the allocation leads to, and what is to be said about it."""
        problem = problem_of(
            self.planner,
            scores,
            self.score.measure,
            balance=self.score.balance,
            seed=self.request.seed,
            judge=self.judge if self.allocation.needs_model else None,
        )
        counts = self.allocation.counts(problem)
        chosen = uniform_widths(problem, counts)
        remarks = self.allocation.remarks()
        varying = sorted({p.kind for p in problem.places if counts[p.name] != problem.uniform[chosen][p.name]})
        if varying:
            widths = {kind: [counts[p.name] for p in problem.places if p.kind == kind] for kind in varying}
            said = "; ".join(f"{kind} {min(found)} to {max(found)}" for kind, found in widths.items())
            remarks.append(
                f"{self.request.allocation} wanted widths of its own in every layer ({said}); a stock "
                f"{self.arch.model_type} config has one for all, so the nearest uniform shape is taken"
            )
        return self.planner.candidates[chosen], remarks

    def _compensate(self, path: str, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        layer, role = self._place(path)
        weight, kept = weight.to(self.device), kept.to(self.device)
        products = self.calibration.products(layer, role).to(self.device) if self.compensation.tokens else None
        found = self.compensation.weight(weight, kept, products)
        if not self.compensation.makes_bias:
            return found, None
        mean = self.calibration.statistics(layer).inputs[role].mean.to(self.device)
        return found, self.compensation.bias(weight, kept, mean)

    def _place(self, path: str) -> tuple[int, str]:
        """(layer, role) of a consumer's path."""
        layer, _, module = path.removeprefix(f"{self.arch.family.layers}.").partition(".")
        return int(layer), next(role for role in CONSUMERS if self.arch.family.modules[role] == module)
