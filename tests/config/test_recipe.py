"""Recipes of a comparison: what can be set of them, and what is refused because nothing would read it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from prunetune.config.recipe import Recipe


def test_options_of_methods_are_told_from_settings_of_the_run() -> None:
    recipe = Recipe(one_shot="taylor", allocation="softmax", set={"score.order": "first", "target": {"align": 9}})
    assert recipe.method_options() == {"score": {"order": "first"}, "allocation": {}}
    assert recipe.run_settings() == {"target.align": 9}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"joint": "saliency", "allocation": "uniform"}, "joint has no `allocation`"),
        ({"reference": "dense", "compensation": "none"}, "dense has no `compensation`"),
        ({"reference": "base", "allocation": "uniform"}, "base has no `allocation`"),
        ({"one_shot": "wanda", "allocation": []}, "at least 1 item"),
        ({"one_shot": "wanda", "compensation": []}, "at least 1 item"),
        ({"one_shot": "wanda", "set": {"seed": 7}}, "compare.seeds"),
        ({"one_shot": "wanda", "set": {"folder": "x"}}, "folder of its own"),
        ({"one_shot": "wanda", "set": {"target.kept": 0.9}}, "compare.kept"),
        ({"one_shot": "wanda", "set": {"target": {"params": "90M"}}}, "compare.kept"),
        ({"one_shot": "wanda", "set": {"target": 0.9}}, "compare.kept"),
        ({"joint": "saliency", "set": {"mask.method": "random"}}, "`joint: MASK`"),
        ({"joint": "saliency", "set": {"mask": "random"}}, "`joint: MASK`"),
        ({"joint": "saliency", "set": {"compensation.method": "none"}}, "`compensation: METHOD`"),
        ({"one_shot": "wanda", "set": {"allocation": "uniform"}}, "`allocation: METHOD`"),
        ({"one_shot": "wanda", "set": {"compensation.tokens": 512}}, "calibrate alike"),
        ({"one_shot": "wanda", "set": {"mask.decay": 0.5}}, "one_shot does not read mask.decay"),
        ({"one_shot": "wanda", "set": {"lora.ranks": "apt"}}, "one_shot does not read lora.ranks"),
        ({"joint": "saliency", "set": {"score.order": "first"}}, "joint does not read score.order"),
        ({"reference": "dense", "set": {"target.align": 9}}, "dense does not read target.align"),
    ],
)
def test_what_nothing_reads_is_refused_with_what_to_do_instead(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe(**recipe)
