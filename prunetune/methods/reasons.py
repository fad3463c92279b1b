"""Why a row stays or goes: the reason codes of all sample methods, in words."""

from __future__ import annotations

REASONS = {
    "all": "no sample method was asked for, so every row with targets stays",
    "top": "it is among {kept} that {method} ranks highest",
    "below": "{method} ranks {kept} that stay higher",
    "bad_score": "{method} has no finite score for it",
    "no_target": "it has no target token within the maximum length, so there is nothing to learn from it",
    "filtered": "it lies outside the limits that {method} was given",
    "Q1": "perplexity and entropy are both high: likely noise",
    "Q2": "perplexity is high and entropy low: a confident mistake, worth learning; its tokens may be dropped",
    "Q3": "perplexity and entropy are both low: the model knows it already",
    "Q4": "perplexity is low and entropy high: it steadies what the model is unsure of; all its tokens stay",
    "middle": "it lies between the quadrants, and others lean further to one side",
    "topup": "it lies in no wanted quadrant, but those hold too few rows, and it leans furthest toward one",
    "trimmed": "it lies in a wanted quadrant, but those hold too many rows, and others lean further",
    "unique": "it repeats no row that stays, and was drawn",
    "duplicate": "it repeats another row",
    "near_duplicate": "its words are nearly those of another row",
    "semantic_duplicate": "it means nearly the same as another row",
    "drawn": "it was drawn by lot",
    "not_drawn": "it would have been good enough, but the lot fell on others",
    "hardest": "it is among the hardest rows, which {method} leaves out",
    "chosen": "it adds most to what the rows chosen before it cover",
    "covered": "rows that stay lie close to it",
    "truncated": "its answer was cut, so {method} cannot judge it",
    "unaided": "its answer is no likelier with its prompt than without",
    "above": "its loss is not below the mean, and {method} keeps all of those",
    "below_mean": "its loss is below the mean, and the lot fell on others",
    "floor": "every step trains on one row at least",
}


def meaning(reason: str, method: str, kept: str = "the rows") -> str:
    """What a reason code says of a row.

    Args:
        reason: see ``SampleChoice.reason``; a code that is not known is shown as it is.
        method: the sample method, or who else decided.
        kept: the rows that stay, in words.
    """
    return REASONS.get(reason, "{method} says " + reason).format(method=method, kept=kept)
