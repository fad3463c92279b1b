"""The end of a run that keeps a part of what was learnt: which part, and what every drop rate would cost.

The live model is measured as it will be exported, and handed back as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from prunetune.config.schema import DeltaConfig, RunConfig
from prunetune.core.console import note
from prunetune.core.files import write_json
from prunetune.core.records import DataBundle
from prunetune.core.streams import stream
from prunetune.evaluate.perplexity import domain_perplexity
from prunetune.export.changed import live_deltas, with_deltas
from prunetune.methods.deltas import DeltaMethod, build_delta, check_delta, context_of, prune_all
from prunetune.methods.deltas.darex_q import DarexQ
from prunetune.model.delta_inputs import Inputs, measure_inputs
from prunetune.model.deltas import Delta
from prunetune.model.surgery import Surgery, base_model
from prunetune.model.token_rows import TokenRow, token_rows
from prunetune.model.token_stats import evaluating
from prunetune.pipeline.delta_search import Judge, Searched, search

DELTA_FILE = "delta.json"
DROPS = (0.0, 0.5, 0.9, 0.95, 0.99)
SEARCH_ROWS, CURVE_ROWS = 32, 64
# With fewer held-out rows than these a search would follow their noise.
_LEAST_ROWS = 8
# Names the random masks of a run's own adapter.
_MODEL = "run"


class DeltaStage:
    """What the adapters of a live model learnt, and what can be left of it.

    Args:
        model: a PeftModel with one adapter, not merged. tokenizer: its tokenizer.
        surgery: by which it was sliced; None: it is dense.
        config: the section. seed: of the masks.
        rows: inputs are measured on these, and open options searched.
        seen: what the linears' inputs are on these rows, if that was measured before.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        surgery: Surgery | None,
        config: DeltaConfig,
        seed: int,
        rows: Sequence[TokenRow],
        seen: Mapping[str, Inputs] | None = None,
    ):
        self.model, self._tokenizer, self.config, self._seed, self._rows = model, tokenizer, config, seed, rows
        self.whole: dict[str, Delta] = dict(live_deltas(model, surgery))
        self._seen: dict[str, Inputs] = dict(seen or {})

    def settle(self, drop: float | None = None) -> Searched:
        """The configured options, at another drop rate if one is given, with what they leave open searched."""
        options = self.config.method_options() | ({} if drop is None else {"drop": drop})
        method, judge = self.build(options), Judge(self.model, self._tokenizer, self._rows)
        if method.search is not None and method.drawn:
            return self._settle_divisors(method, options, judge)

        def score(tried: dict[str, Any]) -> float:
            with with_deltas(self.model, self.pruned(self.build(tried))):
                return judge(self.model)

        return search(self.config.method, options, score)

    def _settle_divisors(self, method: DeltaMethod, options: dict[str, Any], judge: Judge) -> Searched:
        """As ``settle`` where only divisors are open: what stays is the same in every try, and is made once."""
        seen = self._inputs(method)
        kept = {
            name: method.kept(delta, context_of(self._seed, _MODEL)) if name in seen or not method.calibrated else delta
            for name, delta in self.whole.items()
        }
        with with_deltas(self.model, kept) as layers:

            def score(tried: dict[str, Any]) -> float:
                for name, divisor in self.divisors(self.build(tried)).items():
                    layers[name].divisor = divisor or 1.0
                return judge(self.model)

            return search(self.config.method, options, score)

    def build(self, options: Mapping[str, Any]) -> DeltaMethod:
        """The configured method."""
        return build_delta(self.config.method, options)

    def pruned(self, method: DeltaMethod, divisors: Mapping[str, float] | None = None) -> dict[str, Delta]:
        """What the method leaves of every delta.

        Args:
            divisors: q by tensor, of a former call of ``divisors``.
        """
        if not divisors:
            return prune_all(method, self.whole, self._seed, _MODEL, self._inputs(method))
        found = {}
        for name, delta in self.whole.items():
            if name in divisors:
                fixed = self.build({"drop": method.options.model_dump()["drop"], "q": divisors[name]})
                delta = fixed.apply(delta, context_of(self._seed, _MODEL))
            found[name] = delta
        return found

    def divisors(self, method: DeltaMethod) -> dict[str, float]:
        """q of every tensor that was divided by one."""
        if not isinstance(method, DarexQ):
            return {}
        seen = self._inputs(method)
        return {
            name: method.divisor(delta, context_of(self._seed, _MODEL, seen.get(name)))
            for name, delta in self.whole.items()
            if name in seen or not method.calibrated
        }

    def perplexity(self, method: DeltaMethod, rows: Sequence[TokenRow]) -> float:
        """Of the model with what the method leaves."""
        with with_deltas(self.model, self.pruned(method)):
            return domain_perplexity(self.model, self._tokenizer, [asdict(row) for row in rows], None).perplexity

    def _inputs(self, method: DeltaMethod) -> dict[str, Inputs]:
        if method.calibrated and not self._seen:
            device = next(self.model.parameters()).device
            ids = [torch.tensor([row.input_ids], device=device) for row in self._rows]
            batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
            with evaluating(self.model):
                self._seen = measure_inputs(base_model(self.model), self.whole, batches)
        return self._seen if method.calibrated else {}


def finish(stage: DeltaStage, rows: Sequence[TokenRow]) -> dict[str, Any]:
    """The final options, and perplexity at every drop rate, for delta.json.

    Returns:
        method, options (nothing open), drop, perplexity, whole_perplexity, rows, tokens, q (by tensor, if the method
        has one), and ``curve``: drop, perplexity, and what was searched, by rising drop.
    """
    final = stage.settle()
    drop = stage.build(final.options).options.model_dump().get("drop")
    curve = []
    for rate in sorted({*DROPS, *([] if drop is None else [drop])}):
        if problems := check_delta(stage.config.method, {**stage.config.method_options(), "drop": rate}):
            note(f"{stage.config.method} cannot drop {rate:.0%}: {problems[0].message}")
            continue
        settled = final if rate == drop else stage.settle(rate)
        method = stage.build(settled.options)
        point: dict[str, Any] = {"drop": rate, "perplexity": stage.perplexity(method, rows)}
        if settled.option:
            point |= {"searched": settled.option, "tried": [list(pair) for pair in settled.tried]}
        if divisors := stage.divisors(method):
            point["median_q"] = median(divisors.values())
        curve.append(point)
        note(f"{rate:.0%} of the delta dropped: perplexity {point['perplexity']:.3f}")
    method = stage.build(final.options)
    chosen = [point["perplexity"] for point in curve if point["drop"] == drop]
    return {
        "method": stage.config.method,
        "options": final.options,
        "drop": drop,
        "perplexity": chosen[0] if chosen else stage.perplexity(method, rows),
        "whole_perplexity": curve[0]["perplexity"],
        "rows": len(rows),
        "q": stage.divisors(method),
        "curve": curve,
    }


def keep_part(config: RunConfig, trainer: Any, tokenizer: Any, data: DataBundle) -> dict[str, Delta]:
    """What the settings leave of a trained run's deltas; writes delta.json into the run folder.

    Args:
        trainer: PruneTuneTrainer, trained.
    """
    rows, said = search_rows(config, tokenizer, data)
    note(f"delta {config.delta.method}: searched on {len(rows)} {said}")
    stage = trainer.delta_stage(rows)
    facts = finish(stage, curve_rows(config, tokenizer, data)) | {"searched_on": f"{len(rows)} {said}"}
    write_json(config.folder / DELTA_FILE, facts)
    return stage.pruned(stage.build(facts["options"]), facts["q"])


def search_rows(config: RunConfig, tokenizer: Any, data: DataBundle) -> tuple[list[TokenRow], str]:
    """(rows to search on, which they are): held-out rows that the final table leaves out, else training rows."""
    spare = range(min(config.evaluate.rows, len(data.validation)), len(data.validation))[:SEARCH_ROWS]
    if len(spare) >= _LEAST_ROWS:
        return _encoded(config, tokenizer, data.validation.select(spare)), "held-out rows that no table is made from"
    drawn = stream(config.seed, "delta search").permutation(len(data.train))[:SEARCH_ROWS]
    said = "training rows, because every held-out row is in the final table"
    return _encoded(config, tokenizer, data.train.select(drawn.tolist())), said


def curve_rows(config: RunConfig, tokenizer: Any, data: DataBundle) -> list[TokenRow]:
    """Held-out rows of the final table."""
    count = min(config.evaluate.rows, CURVE_ROWS, len(data.validation))
    return _encoded(config, tokenizer, data.validation.select(range(count)))


def _encoded(config: RunConfig, tokenizer: Any, rows: Any) -> list[TokenRow]:
    train = config.train
    return token_rows(
        tokenizer,
        rows,
        train.max_length,
        completion_only=train.completion_only,
        assistant_only=train.assistant_only,
    )
