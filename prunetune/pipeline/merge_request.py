"""What the command line asks of a merge, and everything about it that cannot work before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prunetune.core.errors import ConfigError, Problem, suggest
from prunetune.export.combine import HOWS
from prunetune.export.merge_source import Special
from prunetune.export.stream_merge import MergeSettings
from prunetune.methods.deltas import DELTAS, By, build_delta, check_delta
from prunetune.model.quantized_base import KINDS

# Of --rescale: what dare itself understands, what darex_q finds on rows, and what it needs no rows for.
_DARE = ("inverse_keep", "l1", "none")
Onto = Literal["dequantized", "original", "requantized"]
_DAREX = ("auto", "closed_form", "search", "analytic")


@dataclass(frozen=True)
class Rule:
    """What holds for the tensors in whose name a pattern is found.

    Args:
        pattern: regular expression. weights: of each source there. method: the delta method there.
        options: of the method, before those of the whole merge.
    """

    pattern: str
    weights: Sequence[float] | None = None
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeRequest:
    """What is merged how; as the command line takes it.

    Args:
        folders: adapter or model folders. base: folder or name of the base.
        how: name in HOWS. weights: of each folder; None: all 1.
        delta: delta method; None: the one that ``how`` stands for. options: its options.
        plan: plan.json by which the base was pruned. calibration: rows for methods that look at inputs, and for
            searches.
        rescale: what survivors of random dropping are divided by: a number, or a word of dare's ``rescale`` or of
            darex_q's ``q``. by: what a search goes by.
        rules: what holds for some tensors only. output: adapter: the result stays a LoRA adapter.
        allow_large: drop by lot however large the changes are.
        quantized: nf4, fp4 or int8: how the base was loaded while the sources were trained; a base that is stored so
            needs no saying. onto: what of it is merged onto; default: dequantized.
    """

    folders: Sequence[Path]
    base: str
    how: str = "linear"
    weights: Sequence[float] | None = None
    delta: str | None = None
    options: Mapping[str, Any] | None = None
    plan: Path | None = None
    calibration: str | None = None
    settings: MergeSettings = field(default_factory=MergeSettings)
    rescale: str | None = None
    by: By = "loss"
    rules: Sequence[Rule] = ()
    output: Literal["model", "adapter"] = "model"
    allow_large: bool = False
    quantized: str | None = None
    onto: Onto | None = None

    def problems(self) -> list[Problem]:
        """Everything that cannot work, before anything is read."""
        found = []
        if self.how not in HOWS:
            return [Problem(f"there is no way of merging {self.how!r}; {suggest(self.how, HOWS)}", "--how")]
        for where, weights in (("--weights", self.weights), *((f"--for {r.pattern}", r.weights) for r in self.rules)):
            if weights is not None and len(weights) != len(self.folders):
                found.append(Problem(f"{len(weights)} weights for {len(self.folders)} models; give one each", where))
        if len({folder.resolve() for folder in self.folders}) < len(self.folders):
            found.append(Problem("the same folder is named twice; raise its weight instead", "SOURCES"))
        if HOWS[self.how].consensus and len(self.folders) == 1:
            found.append(
                Problem(f"{self.how} lets models vote on signs; with one model take linear and --delta", "--how")
            )
        if self.output == "adapter" and HOWS[self.how].consensus:
            found.append(
                Problem(f"{self.how} makes a sum that is no product of factors; take linear or average", "--output")
            )
        if self.output == "adapter" and self.settings.keep_zeros is not None:
            found.append(Problem("is about the base's own weights, and an adapter has none", "--keep-zeros"))
        if self.quantized not in (None, *KINDS):
            found.append(Problem(f"is {self.quantized}; {suggest(str(self.quantized), KINDS)}", "--quantized"))
        found += self._rescale_problems() or check_delta(self.method, self.method_options)
        for rule in self.rules:
            faults = check_delta(*self.of_rule(rule))
            found += [Problem(fault.message, f"--for {rule.pattern}") for fault in faults]
        return found

    def _rescale_problems(self) -> list[Problem]:
        method = self._asked
        if self.rescale is None:
            return []
        if method not in ("dare", "darex_q", "structural", "identity"):
            return [Problem(f"divides what random dropping leaves, and {method} does not drop by lot", "--rescale")]
        words = (*_DARE, *_DAREX)
        if not self.rescale[:1].isdigit() and self.rescale[:1] != "." and self.rescale not in words:
            return [Problem(f"{self.rescale!r} is no number; {suggest(self.rescale, words)}", "--rescale")]
        return []

    @property
    def _asked(self) -> str:
        """Name of the delta method before --rescale has its say."""
        return DELTAS.canonical(self.delta or HOWS[self.how].delta)

    @property
    def method(self) -> str:
        """Name of the delta method."""
        method = self._asked
        if self.rescale is None or method == "structural":
            return method
        # Without rows there is nothing to find q by: dare's own divisor is unbiased.
        return "dare" if self.rescale in _DARE or (self.rescale == "auto" and not self.calibration) else "darex_q"

    @property
    def method_options(self) -> dict[str, Any]:
        """Its options: the user's before those of the way of merging."""
        preset = HOWS[self.how].options if self.delta in (None, HOWS[self.how].delta) else {}
        chosen: dict[str, Any] = {}
        if self.rescale is not None and self.method == "dare":
            chosen = {"rescale": self.rescale if self.rescale in _DARE else "inverse_keep"}
        elif self.rescale is not None:
            chosen = {"q": f"0{self.rescale}" if self.rescale.startswith(".") else self.rescale}
        return {**preset, **chosen, **(self.options or {})}

    def of_rule(self, rule: Rule, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """(delta method, its options) for the tensors of a rule.

        Args:
            options: of the whole merge; default: as they were asked for.
        """
        if rule.method not in (None, self.method):
            return str(rule.method), dict(rule.options)
        return self.method, {**(self.method_options if options is None else options), **rule.options}

    def special(self, source: int, options: Mapping[str, Any] | None) -> list[Special]:
        """The rules as the source of that number has them.

        Args:
            options: of the whole merge, nothing left open; None: nothing is pruned anywhere.
        """
        found = []
        for rule in self.rules:
            weight = None if rule.weights is None else rule.weights[source]
            pruned = options is not None and (rule.method or rule.options)
            method = build_delta(*self.of_rule(rule, options)) if pruned else None
            found.append(Special(re.compile(rule.pattern), weight, method))
        return found


def parse_rule(text: str) -> Rule:
    """``REGEX: weights=.7,.3 drop=80% delta=magnitude`` as a rule.

    Raises:
        ConfigError: it is not of that form.
    """
    pattern, _, rest = text.rpartition(":")
    values: dict[str, Any] = {}
    if not pattern.strip() or not rest.strip():
        raise ConfigError([Problem("is not of the form 'REGEX: KEY=VALUE ...'", f"--for {text}")])
    for part in rest.split():
        key, sign, value = part.partition("=")
        if not sign:
            raise ConfigError([Problem(f"{part!r} is not KEY=VALUE", f"--for {text}")])
        values[key] = value
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError([Problem(f"is no regular expression: {error}", f"--for {pattern}")]) from None
    weights, method = values.pop("weights", None), values.pop("delta", None)
    if method is not None:
        DELTAS.get(method)
        method = DELTAS.canonical(method)
    return Rule(pattern, None if weights is None else parse_weights(weights, f"--for {text}"), method, values)


def parse_weights(text: str, where: str = "--weights") -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError([Problem(f"{text} is not a list of numbers such as .5,.3,.2", where)]) from None
