"""Static and random: following a plan to the letter, and refusing one that cannot be followed."""

from __future__ import annotations

import pytest
import torch

from prunetune.config.schema import TargetConfig
from prunetune.core.errors import BudgetError, ConfigError, PlanMismatchError
from prunetune.methods.masks import MaskContext, build_mask
from prunetune.model.budget import Shape
from prunetune.model.planner import Planner
from tests.contracts.masks import PHASES, context
from tests.support import random_plan, tiny_arch

ARCH = tiny_arch()


def follow(folder, plan, units=("mlp_channels", "kv_groups"), kept="50%", model_type="llama"):
    plan.save(folder / "plan.json")
    planner = Planner(tiny_arch(model_type), TargetConfig(kept=kept, units=units, align=8))
    return build_mask("static", {"plan": folder / "plan.json"}, MaskContext(planner, PHASES, 0))


def test_the_frozen_plan_is_the_given_one(tmp_path):
    plan = random_plan(ARCH, ("mlp_channels", "kv_groups"), seed=1, mlp_channels=24)
    mask = follow(tmp_path, plan)
    frozen = mask.plan({"step": 9})
    assert frozen.kept == plan.kept
    assert frozen.origin == {**plan.origin, "step": 9}


def test_its_scores_lead_the_planner_back_to_it(tmp_path):
    of = context()
    plan = of.planner.plan({site.name: torch.arange(site.size) % 7 for site in of.planner.sites})
    mask = follow(tmp_path, plan)
    assert mask.context.planner.plan(mask.scores()).kept == plan.kept


def test_a_plan_above_the_budget_is_refused(tmp_path):
    plan = random_plan(ARCH, ("mlp_channels",), mlp_channels=56)
    with pytest.raises(BudgetError, match=r"mask\.plan .* more than the target"):
        follow(tmp_path, plan)


def test_a_plan_of_another_model_is_refused(tmp_path):
    with pytest.raises(PlanMismatchError, match="another model"):
        follow(tmp_path, random_plan(tiny_arch(intermediate_size=80), ("mlp_channels",), mlp_channels=8))


def test_a_plan_that_removes_what_the_target_does_not_allow_is_refused(tmp_path):
    """There would be no gates for those units: the model would lose them unprepared."""
    plan = random_plan(ARCH, ("mlp_channels", "layers"), mlp_channels=24)
    with pytest.raises(PlanMismatchError, match=r"layers.*target\.units"):
        follow(tmp_path, plan)


def test_a_plan_whose_heads_no_config_can_say_is_refused(tmp_path):
    wide = {"num_attention_heads": 6, "num_key_value_heads": 6}
    plan = random_plan(tiny_arch(**wide), ("kv_groups", "mlp_channels"), shape=Shape(3, 5, 1, 16))
    plan.save(tmp_path / "plan.json")
    planner = Planner(tiny_arch(**wide), TargetConfig(kept="60%", align=8))
    with pytest.raises(BudgetError, match="5 query heads"):
        build_mask("static", {"plan": tmp_path / "plan.json"}, MaskContext(planner, PHASES, 0))


def test_a_missing_plan_option_and_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"mask\.plan"):
        build_mask("static", {}, context())
    with pytest.raises(PlanMismatchError, match="no plan at"):
        build_mask("static", {"plan": tmp_path / "none.json"}, context())


def test_random_choices_depend_on_the_seed_alone():
    plans = [build_mask("random", {}, context(seed=seed)).plan({}) for seed in (0, 0, 1)]
    assert plans[0].kept == plans[1].kept
    assert plans[0].kept != plans[2].kept
    first, second = plans[0].kept["layers.0.mlp_channels"], plans[0].kept["layers.1.mlp_channels"]
    assert first != second, "layers are drawn apart"
