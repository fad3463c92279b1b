"""What `prunetune prune` is asked for, and everything about it that cannot work, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunetune.config.schema import TargetConfig
from prunetune.core.errors import Problem
from prunetune.methods.allocation import Allocation, build_allocation, check_allocation
from prunetune.methods.compensation import Compensation, build_compensation, check_compensation
from prunetune.methods.scores import SCORES, check_score
from prunetune.model.budget import DTYPE_BYTES
from prunetune.model.units import LAYERS_SITE

# The smallest values that mean something.
LEAST = {"tokens": 1, "judge_tokens": 1, "max_length": 8, "shard_size": 1, "seed": 0}


@dataclass(frozen=True)
class PruneRequest:
    """What is pruned how; as the command line takes it.

    Args:
        model: folder or name of the base. out: folder to write.
        target: the budget, the kinds of units, the alignment.
        score, allocation, compensation: names of methods.
        options: ``score``, ``allocation`` or ``compensation`` -> that method's own options.
        calibration: a file of rows, or rows in prompt-completion, messages or text form; None for methods without.
        tokens: calibration tokens. judge_tokens: kept apart for methods that try cuts out. max_length: of a row.
        dtype: of the exported weights. shard_size: bytes of a weights file at most. seed: of everything random.
        cache: where statistics are kept for another size or score; default: ``prune-cache`` beside ``out``.
        replace: overwrite an earlier export. verify: prove the export in a fresh process.
    """

    model: str
    out: Path
    target: TargetConfig
    score: str = "wanda"
    allocation: str = "uniform"
    compensation: str = "refit"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: str | Sequence[Mapping[str, Any]] | None = None
    tokens: int = 16384
    judge_tokens: int = 2048
    max_length: int = 512
    dtype: str = "bfloat16"
    shard_size: int = 10**9
    seed: int = 0
    cache: Path | None = None
    replace: bool = False
    verify: bool = True

    def problems(self) -> list[Problem]:
        """Everything that cannot work, before anything is read."""
        of = {section: dict(self.options.get(section, {})) for section in ("score", "allocation", "compensation")}
        found = [
            *check_score(self.score, of["score"], self.target.units),
            *check_allocation(self.allocation, of["allocation"]),
            *check_compensation(self.compensation, of["compensation"], one_shot=True),
        ]
        found += self._settings_problems()
        if "tokens" in of["compensation"]:
            found.append(Problem("pruning in one shot takes its calibration tokens from --tokens", "compensation"))
        units = set(self.target.units)
        if ("layers" in units and len(units) > 1) or {"kv_groups", "query_heads"} <= units:
            found.append(
                Problem(
                    f"{', '.join(self.target.units)} cannot be spread over together, because the cost of one depends "
                    "on the other: take layers alone, or mlp_channels with kv_groups or query_heads",
                    "--units",
                )
            )
        if "hidden" in units:
            why = (
                "hidden dimensions belong to all layers, and a one-shot pass sees one at a time; use `prunetune train`"
            )
            found.append(Problem(why, "--units"))
        if found or self.calibration is not None:
            return found
        for section, name, needs in self._needs():
            if needs:
                found.append(Problem(f"{name} looks at real inputs; name a file of rows", f"{section}: --calibration"))
        return found

    def _settings_problems(self) -> list[Problem]:
        """Those of single settings."""
        found = [
            Problem(f"{value} is too small; set at least {least}", f"--{name.replace('_', '-')}")
            for name, least in LEAST.items()
            if (value := getattr(self, name)) < least
        ]
        if self.dtype not in DTYPE_BYTES:
            found.append(Problem(f"{self.dtype} is not {' or '.join(DTYPE_BYTES)}", "--dtype"))
        return found

    @property
    def compensates(self) -> bool:
        """Whether any linear can lose inputs, which is what a compensation is about; layers leave whole."""
        return set(self.target.units) != {LAYERS_SITE}

    def built(self) -> tuple[Compensation, Allocation]:
        """The compensation and the allocation."""
        compensation = build_compensation(self.compensation, self.options.get("compensation", {}), one_shot=True)
        return compensation, build_allocation(self.allocation, self.options.get("allocation", {}))

    def _needs(self) -> list[tuple[str, str, bool]]:
        """(section, method, whether it needs rows)."""
        compensation, allocation = self.built()
        score = SCORES.get(self.score)
        looks = bool(compensation.tokens) or compensation.makes_bias
        return [
            ("score", self.score, bool(score.needs - {"weights"})),
            ("allocation", self.allocation, allocation.needs_model),
            ("compensation", self.compensation, self.compensates and looks),
        ]


def default_units(score: str) -> tuple[str, ...]:
    """The kinds of units that are pruned if nobody says: the usual ones that the score can rank, or whole layers."""
    usual = TargetConfig.model_fields["units"].default
    kinds = SCORES.get(score).kinds
    return tuple(kind for kind in usual if kind in kinds) or (LAYERS_SITE,)
