"""The hidden width as a unit: what a dimension of the residual stream owns, and that masked equals sliced."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from prunetune.config.schema import TargetConfig
from prunetune.core.errors import BudgetError, PlanMismatchError
from prunetune.model.architecture import describe
from prunetune.model.budget import full_shape, plan_shape, total_params
from prunetune.model.gates import GateSet
from prunetune.model.plan import Plan
from prunetune.model.planner import Planner
from prunetune.model.stream import round_stream
from prunetune.model.surgery import Surgery, base_model, slice_model
from prunetune.model.units import HIDDEN, KINDS, parse_site, sites
from tests.model.test_masked_equals_sliced import ADAPTERS, generate, randomise_adapters
from tests.support import MODEL_TYPES, VARIANTS, batch, count, hard_gates, logits, random_plan, tiny_arch, tiny_model

# 24 of 48 dimensions, which 6 query heads divide.
KEPT = tuple(sorted(torch.randperm(48, generator=torch.Generator().manual_seed(2))[:24].tolist()))
TOLERANCE = 2e-5
FULLEST = [f"{kind}-biased" if f"{kind}-biased" in VARIANTS else f"{kind}-untied" for kind in MODEL_TYPES]


def narrow_plan(arch, kinds=()):
    others = random_plan(arch, kinds, seed=7).kept if kinds else {}
    return Plan({**others, HIDDEN: KEPT}, arch.fingerprint())


def mask(model, plan):
    base = base_model(model)
    arch = describe(base.config)
    gates = GateSet(base, sites(arch, (*KINDS, HIDDEN)))
    gates.attach()
    gates.set(hard_gates(arch, gates.sites, plan))
    return gates


def assert_masked_equals_sliced(model, plan):
    inputs = batch(2, 11, padding=3)
    real = inputs["attention_mask"].bool()
    open_ = logits(model, inputs)
    gates = mask(model, plan)
    masked = logits(model, inputs)
    gates.detach()
    torch.testing.assert_close(logits(model, inputs), open_, atol=0, rtol=0)
    arch = slice_model(model, plan)
    assert (open_ - masked)[real].abs().max() > 1e-2, "the plan must change something"
    torch.testing.assert_close(logits(model, inputs)[real], masked[real], atol=TOLERANCE, rtol=TOLERANCE)
    return arch


@pytest.mark.parametrize("kinds", [(), KINDS], ids=["alone", "with all other kinds"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_equals_sliced_in_every_family(variant, kinds):
    model_type, changes = VARIANTS[variant]
    model = tiny_model(model_type, **changes)
    plan = narrow_plan(describe(model.config), kinds)
    arch = assert_masked_equals_sliced(model, plan)
    assert plan_shape(arch, plan).hidden == len(KEPT) == model.config.hidden_size
    assert count(model) == total_params(arch, plan_shape(arch, plan))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == arch.tied_embeddings


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_epsilon_is_that_of_the_dimensions_that_stay(model_type):
    """With an epsilon as large as the stream itself; the norms of head size have the same one and stay as they are."""
    model = tiny_model(model_type, rms_norm_eps=0.3)
    assert_masked_equals_sliced(model, narrow_plan(describe(model.config)))
    assert model.config.rms_norm_eps == 0.3


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_with_adapters(model_type, adapter):
    model = get_peft_model(tiny_model(model_type), ADAPTERS[adapter]).eval()
    randomise_adapters(model)
    assert_masked_equals_sliced(model, narrow_plan(describe(base_model(model).config), KINDS))
    if adapter != "biases":  # PEFT merges an adapter's bias only where the base has one too
        apart = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), apart, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("variant", FULLEST)
def test_exactly_what_a_closed_dimension_owns_is_dead(variant):
    """Over all parameters: the closed index of every axis along the stream has no gradient, everything else has one."""
    model_type, changes = VARIANTS[variant]
    model = tiny_model(model_type, **changes)
    arch, closed = describe(model.config), 5
    gates = GateSet(model, sites(arch, [HIDDEN]))
    gates.attach()
    value = torch.ones(arch.hidden_size)
    value[closed] = 0.0
    gates.set({HIDDEN: value})
    ids = torch.arange(99).reshape(9, 11)
    model.get_input_embeddings().padding_idx = None
    out = model(input_ids=ids).logits
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for name, parameter in model.named_parameters():
        for axis, size in enumerate(parameter.shape):
            largest = parameter.grad.transpose(0, axis).reshape(size, -1).abs().amax(1)
            dead = set(torch.nonzero(largest == 0).flatten().tolist())
            # Query features are as many as dimensions of the stream here, and only these are closed.
            linear = name.rsplit(".", 2)[-2]
            along = size == arch.hidden_size and not (
                (linear == "q_proj" and axis == 0) or (linear == "o_proj" and axis == 1)
            )
            assert dead == ({closed} if along else set()), (name, axis)


@pytest.mark.parametrize("variant", FULLEST)
def test_randomising_a_closed_dimension_does_not_move_the_output(variant):
    model_type, changes = VARIANTS[variant]
    model = tiny_model(model_type, **changes)
    arch, closed = describe(model.config), [5, 17]
    plan = Plan({HIDDEN: tuple(i for i in range(48) if i not in closed)}, arch.fingerprint())
    mask(model, plan)
    before, generator = logits(model), torch.Generator().manual_seed(1)
    surgery, kept = Surgery(arch, plan), torch.tensor([i not in closed for i in range(48)])
    for name, parameter in model.named_parameters():
        cut = surgery.cuts.get(name.rsplit(".", 1)[0])
        along = [-1] if cut is None and "q_norm" not in name and "k_norm" not in name else []
        if cut is not None:
            sides = (cut.rows, cut.columns)[: parameter.dim()]
            along = [axis for axis, side in enumerate(sides) if side is not None]
        for axis in along:
            values = parameter.data.transpose(0, axis)
            values[~kept] = torch.randn(values[~kept].shape, generator=generator)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)


def test_the_gates_gradient_is_the_loss_s_slope():
    model = tiny_model().double()
    gates = GateSet(model, sites(describe(model.config), [HIDDEN]), record_squares=True)
    gates.attach()
    value = torch.linspace(0.2, 1.0, 48)
    inputs = batch()

    def loss(at):
        gates.set({HIDDEN: at})
        gates._open[HIDDEN] = float(value.mean())  # epsilon follows the gates' number, not their gradient
        return model(**inputs, labels=inputs["input_ids"]).loss

    loss(value).backward()
    found = gates.collect()
    for index in (0, 13, 47):
        step = torch.zeros(48)
        step[index] = 2**-6
        with torch.no_grad():
            slope = (loss(value + step) - loss(value - step)) / 2**-5
        assert float(found.grad[HIDDEN][index]) == pytest.approx(float(slope), rel=2e-3, abs=1e-6)
    assert (found.square[HIDDEN] > 0).all()


def test_open_gates_and_the_bypass_change_nothing():
    model = tiny_model()
    before = logits(model)
    gates = mask(model, narrow_plan(describe(model.config)))
    assert not torch.equal(logits(model), before)
    with gates.opened():
        assert torch.equal(logits(model), before)
    gates.set({HIDDEN: torch.ones(48)})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_generation_and_a_reloaded_folder(tmp_path, model_type):
    model = tiny_model(model_type)
    plan = narrow_plan(describe(model.config), ("mlp_channels",))
    inputs = batch(3, 8, padding=2, seed=3)
    gates = mask(model, plan)
    masked = generate(model, inputs, cache=True)
    gates.detach()
    slice_model(model, plan)
    assert torch.equal(generate(model, inputs, cache=True), masked)
    assert torch.equal(generate(model, inputs, cache=False), masked)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(logits(again), logits(model))
    assert count(again) == count(model)


def test_what_is_rescaled_is_rounded_once():
    """In bfloat16: kept in float64 for the comparison, then rounded to what cutting at once gives."""
    at_once, later = tiny_model("gemma2").bfloat16(), tiny_model("gemma2").bfloat16()
    plan = narrow_plan(describe(later.config))
    slice_model(at_once, plan)
    slice_model(later, plan, rounded=False)
    assert {p.dtype for p in later.parameters()} == {torch.bfloat16, torch.float64}
    round_stream(later)
    for (name, wanted), (_, found) in zip(at_once.named_parameters(), later.named_parameters(), strict=True):
        assert found.dtype == torch.bfloat16, name
        assert torch.equal(found, wanted), name


def test_the_hidden_width_is_one_site_with_a_name():
    arch = tiny_arch("gemma2")
    [site] = sites(arch, [HIDDEN])
    assert parse_site("hidden") == (-1, "hidden") == (site.layer, site.kind)
    assert site.size == 48
    assert len(site.gated) == 1 + 2 * arch.layers
    assert len(site.norms) == 4 * arch.layers + 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_planned_widths_are_legal_aligned_and_inside_the_budget(model_type):
    arch = tiny_arch(model_type)
    scores = {"hidden": torch.arange(48.0), "layers.0.mlp_channels": torch.ones(64)}
    alone = Planner(arch, TargetConfig(kept="60%", units=("hidden",), align=8))
    plan = alone.plan(scores)
    shape = plan_shape(arch, plan)
    assert alone.budget.cost(arch, shape) <= alone.budget.limit
    # Alone, 60% would be 28 of 48: the next multiple of 8 below is 24, which 6 query heads divide, too.
    assert shape.hidden == 24
    assert plan.kept[HIDDEN] == tuple(range(48 - shape.hidden, 48))
    both = Planner(arch, TargetConfig(kept="60%", units=("hidden", "mlp_channels"), align=8))
    widths = {shape.width(arch) for shape in both.candidates}
    assert 48 in widths
    # A llama or gemma config refuses 40 and 32 beside 6 query heads.
    assert (32 in widths) == (40 in widths) == (model_type in ("mistral", "qwen2", "qwen3"))
    assert full_shape(arch).width(arch) == 48
    assert all(both.budget.cost(arch, shape) <= both.budget.limit for shape in both.candidates)


def test_a_width_that_no_head_count_divides_is_refused_with_the_nearest_step():
    with pytest.raises(BudgetError, match=r"6 query heads divide: with target.align 32 that is every 96 dimensions"):
        Planner(tiny_arch(), TargetConfig(kept="60%", units=("hidden",), align=32))


@pytest.mark.parametrize("kept", [(), (3, 3, 4), (0, 48), (2, 1)])
def test_damaged_plans_are_refused(kept):
    arch = tiny_arch()
    with pytest.raises(PlanMismatchError, match=r"hidden must keep at least one of 0\.\.47"):
        Plan({HIDDEN: kept}, arch.fingerprint()).check(arch)


def test_the_digest_knows_the_hidden_width(tmp_path):
    arch = tiny_arch()
    plan = narrow_plan(arch)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").digest() == plan.digest() != Plan({}, arch.fingerprint()).digest()
