"""One recipe of a comparison: how a smaller model is made. What it names but nothing would read is refused here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from prunetune.config.schema import Section
from prunetune.config.source import SHORT_FORMS

BASE, DENSE, JOINT, ONE_SHOT = "base", "dense", "joint", "one_shot"
REFERENCES = (BASE, DENSE)
# Sections of `set` that only one_shot has; their keys are options of its score and of its allocation.
METHODS = ("score", "allocation")

_JOINT_ONLY = ("mask", "distill", "delta", "lora.ranks")
_UNREAD = {
    BASE: ("target", "compensation", *_JOINT_ONLY, *METHODS),
    DENSE: ("target", "compensation", *_JOINT_ONLY, *METHODS),
    JOINT: METHODS,
    ONE_SHOT: _JOINT_ONLY,
}
_ELSEWHERE = {
    "seed": "the seeds of all recipes are compare.seeds",
    "folder": "every run has a folder of its own in the comparison's `folder`",
    **dict.fromkeys(("target.kept", "target.params", "target.size"), "the budgets of all recipes are compare.kept"),
    "mask.method": "write `joint: MASK`",
    "score": "write `one_shot: SCORE`",
    "allocation": "write `allocation: METHOD` beside `set`",
    "compensation.method": "write `compensation: METHOD` beside `set`",
}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


Names = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class Recipe(Section):
    """One way to get a smaller model, or several: lists of names stand for every combination.

    Example:
        >>> Recipe(one_shot=["wanda", "taylor"], compensation="refit").one_shot
        ('wanda', 'taylor')
    """

    reference: str | None = Field(None, description="base (as it is) or dense (plain LoRA); nothing is removed")
    joint: Names = Field((), description="masks that are trained while the adapters learn")
    one_shot: Names = Field((), description="scores by which the base is pruned before LoRA trains for all the steps")
    allocation: Names = Field(("uniform",), description="how one_shot spreads the budget")
    compensation: Names = Field(("refit",), description="what the weights that stay do about the others")
    set: Annotated[dict[str, Any], AfterValidator(_flat)] = Field(
        default_factory=dict,
        description="further settings of this recipe, by dotted key; for one_shot score.KEY and allocation.KEY, too",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """``- dense`` is ``- {reference: dense}``."""
        return {"reference": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _all_is_read(self) -> Recipe:
        kinds = [name for name in ("reference", JOINT, ONE_SHOT) if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(
                f"a recipe is base, dense, `joint: MASK` or `one_shot: SCORE`; set here: {', '.join(kinds) or 'none'}"
            )
        if self.reference and self.reference not in REFERENCES:
            raise ValueError(f"{self.reference!r} is not base or dense; for a mask write `joint: {self.reference}`")
        if faults := [*self._unread_fields(), *self._unread_settings()]:
            raise ValueError("; ".join(faults))
        return self

    @property
    def kind(self) -> str:
        """base, dense, joint or one_shot."""
        return self.reference or (JOINT if self.joint else ONE_SHOT)

    def method_options(self) -> dict[str, dict[str, Any]]:
        """score, allocation -> that method's own options, out of ``set``."""
        parts = {key: key.partition(".") for key in self.set}
        return {
            section: {part[2]: self.set[key] for key, part in parts.items() if part[0] == section}
            for section in METHODS
        }

    def run_settings(self) -> dict[str, Any]:
        """The keys of ``set`` that are settings of the run."""
        return {key: value for key, value in self.set.items() if key.partition(".")[0] not in METHODS}

    def _unread_fields(self) -> Iterator[str]:
        fields = {JOINT: ("allocation",), ONE_SHOT: ()}.get(self.kind, ("allocation", "compensation"))
        for name in fields:
            if name in self.model_fields_set:
                yield f"{self.kind} has no `{name}`; remove it"

    def _unread_settings(self) -> Iterator[str]:
        for key in self.set:
            short = SHORT_FORMS.get(tuple(key.split(".")))
            spelt = f"{key}.{short}" if short else key
            if any(f"{spelt}.".startswith(f"{section}.") for section in _UNREAD[self.kind]):
                yield f"{self.kind} does not read {key}; remove it from `set`"
            elif spelt in _ELSEWHERE:
                yield f"`set` cannot change {key}: {_ELSEWHERE[spelt]}"
            elif spelt == "compensation.tokens" and self.kind == ONE_SHOT:
                # Runs that differ in their compensation alone would rank units by different rows.
                yield f"`set` cannot change {key}: all one_shot runs calibrate alike; set it outside `compare`"
