"""Numbers about a selection as a whole: what was asked for and reached, what shifted, what it costs and saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from prunetune import __version__
from prunetune.core.sizes import format_fraction
from prunetune.data.selection import STRATA, Selection, settings_json
from prunetune.data.selection_audit import meaning
from prunetune.methods.ranking import rank_correlation
from prunetune.methods.samples._stratify import make_strata

FACTS = "selection.json"
SCORES = ("tokenizer", "tokenizer_hash", "template_hash", "max_length", "targets", "model", "model_hash", "reference",
          "reference_hash", "rows_hash", "seconds", "scored_tokens")  # fmt: skip
_MOST_GROUPS = 30
_SUSPICIOUS = 0.7


def selection_facts(selection: Selection) -> dict[str, Any]:
    """Everything that selection.json says; JSON values only."""
    counts = _counts(selection)
    composition = {name: groups for name in STRATA if (groups := _composition(selection, name))}
    header = selection.scores.header
    facts: dict[str, Any] = {
        "prunetune": __version__,
        "settings": settings_json(selection.settings),
        "scores": {"folder": str(selection.folder) if selection.folder else None}
        | {name: header.get(name) for name in SCORES},
        "removes": selection.removes,
        "counts": counts,
        "requested": {
            "samples": selection.settings.samples_kept,
            "tokens_of_kept_rows": selection.settings.tokens_kept,
            "target_tokens": selection.settings.samples_kept * selection.settings.tokens_kept,
        },
        "achieved": _achieved(counts),
        "reasons": dict(sorted(Counter(map(str, selection.choice.reason)).items())),
        "composition": composition,
        "score_length_spearman": rank_correlation(
            selection.choice.value, selection.scores.table.targets.astype(np.float64)
        ),
        "topup_share": float((selection.choice.reason[selection.choice.keep] == "topup").mean()),
        "cost": projected_cost(header.get("seconds"), counts["kept_forward_tokens"] / max(1, counts["forward_tokens"])),
    }
    facts["meanings"] = {reason: meaning(selection, reason) for reason in facts["reasons"]}
    facts["warnings"] = list(_warnings(selection, facts))
    return facts


def _counts(selection: Selection) -> dict[str, int]:
    scores, keep = selection.scores, selection.choice.keep
    lengths = np.array([len(ids) for ids in scores.input_ids], dtype=np.int64)
    targets_of_kept = int(scores.table.targets[keep].sum())
    kept = int(selection.kept.sum())
    forward = int(lengths[keep].sum()) - (targets_of_kept - kept if selection.removes else 0)
    return {
        "rows": len(scores.table),
        "kept_rows": int(keep.sum()),
        "target_tokens": int(scores.table.targets.sum()),
        "target_tokens_of_kept_rows": targets_of_kept,
        "kept_target_tokens": kept,
        "forward_tokens": int(lengths.sum()),
        "kept_forward_tokens": forward,
    }


def _achieved(counts: Mapping[str, int]) -> dict[str, float]:
    return {
        "samples": counts["kept_rows"] / counts["rows"],
        "tokens_of_kept_rows": counts["kept_target_tokens"] / max(1, counts["target_tokens_of_kept_rows"]),
        "target_tokens": counts["kept_target_tokens"] / max(1, counts["target_tokens"]),
        "forward_tokens": counts["kept_forward_tokens"] / max(1, counts["forward_tokens"]),
    }


def _composition(selection: Selection, by: Any) -> list[dict[str, Any]]:
    """Rows of each group before and after; [] where the scores do not have the column."""
    table, keep = selection.scores.table, selection.choice.keep
    if by != "length" and by not in table.rows:
        return []
    names = make_strata(table, [by])
    before, after = Counter(map(str, names)), Counter(map(str, names[keep]))
    groups = [(name, count, after[name]) for name, count in before.most_common()]
    if len(groups) > _MOST_GROUPS:
        rest = groups[_MOST_GROUPS - 1 :]
        others = (f"{len(rest)} others", sum(row[1] for row in rest), sum(row[2] for row in rest))
        groups = [*groups[: _MOST_GROUPS - 1], others]
    if by == "length":
        groups.sort(key=lambda group: int(group[0].split("-")[0]))
    return [
        {
            "name": name or "(none)",
            "rows": count,
            "kept_rows": stay,
            "share": count / len(table),
            "kept_share": stay / max(1, int(keep.sum())),
        }
        for name, count, stay in groups
    ]


def projected_cost(scoring_seconds: float | None, forward: float) -> dict[str, Any]:
    """Training FLOPs on the kept rows with one scoring pass, over those on all rows without.

    A forward pass counts 1; a step of full fine-tuning 3, of LoRA 2. Token masks save nothing here: the body of the
    model still runs on every token of a kept row.

    Args:
        scoring_seconds: what the scoring pass took.
        forward: kept fraction of the tokens that the model reads.
    """
    relative = {
        f"{kind}, {epochs} epoch{'s' if epochs > 1 else ''}": round((1 + epochs * step * forward) / (epochs * step), 4)
        for kind, step in (("LoRA", 2), ("full fine-tuning", 3))
        for epochs in (1, 3)
    }
    # One LoRA step costs about what scoring its rows twice does; on the machine that scored.
    saved = None if scoring_seconds is None else round(2 * scoring_seconds * (1 - forward), 1)
    return {
        "scoring_seconds": scoring_seconds,
        "relative_flops": relative,
        "seconds_saved_per_lora_epoch": saved,
    }


def _warnings(selection: Selection, facts: Mapping[str, Any]) -> Iterator[str]:
    rho = facts["score_length_spearman"]
    if rho is not None and abs(rho) > _SUSPICIOUS and selection.settings.samples_method not in ("length", "random"):
        yield (
            f"the score follows the number of target tokens (Spearman {rho:+.2f}): this is in good part a selection by "
            "length. Compare with method length, or stratify by length"
        )
    if facts["topup_share"] > 0.5:
        yield (
            f"{format_fraction(facts['topup_share'])} of the kept rows were topped up: perplexity and entropy rise "
            "together here, so the quadrants hold few rows and their difference decides"
        )
    for by, groups in facts["composition"].items():
        gone = [group["name"] for group in groups if group["rows"] and not group["kept_rows"]]
        if gone and by != "length":
            yield f"no row of {by} {', '.join(gone)} stays; set stratify to {by}, with a minimum, to hold it"
    for part in ("samples", "tokens_of_kept_rows"):
        wanted, reached = facts["requested"][part], facts["achieved"][part]
        slack = max(0.02, 1 / facts["counts"]["rows"]) if part == "samples" else 0.02
        # Asking a method for all rows is asking what it lets through.
        if wanted < 1 and abs(wanted - reached) > slack:
            yield (
                f"{part.replace('_', ' ')}: {format_fraction(wanted)} asked for, {format_fraction(reached)} reached; "
                f"{_why(part, selection)}"
            )
    for reason, said in (("bad_score", "have no finite score"), ("no_target", "have no target token")):
        if facts["reasons"].get(reason):
            yield f"{facts['reasons'][reason]} of {facts['counts']['rows']} rows {said} and are left out"
    weight = selection.choice.weight
    if weight is not None and not np.all(weight[selection.choice.keep] == 1):
        yield "the method weighs the kept rows (column weight), and plain TRL does not read weights"


def _why(part: str, selection: Selection) -> str:
    if part == "samples":
        few = selection.choice.keep.mean() < selection.settings.samples_kept
        return "the method cannot judge, or does not allow, more rows" if few else "the method decides how many"
    if selection.removes:
        return "whole paragraphs leave, and the last one stays"
    if selection.choice.prunable is not None:
        return "rows that the sample method keeps whole, protected tokens and floors stay"
    return "protected tokens and floors stay, and each row's share is rounded up"
