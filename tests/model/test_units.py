"""The unit tables, proved on real models: what a table names does not matter once its gate is closed, all else does."""

from __future__ import annotations

import pytest
import torch

from prunetune.core.errors import UnsupportedModelError
from prunetune.model.architecture import describe
from prunetune.model.families import FAMILIES, Columns, Rows, Writers
from prunetune.model.gates import GateSet
from prunetune.model.units import KINDS, parse_site, site_name, sites
from tests.support import MODEL_TYPES, VARIANTS, batch, logits, tiny_config, tiny_model

# The variant with the most tensors to get wrong: biases wherever the family's config has them.
FULLEST = [f"{kind}-biased" if f"{kind}-biased" in VARIANTS else f"{kind}-untied" for kind in MODEL_TYPES]
LAYER, UNIT = 1, 1


def features(arch, span, unit):
    width = {"channel": 1, "head": arch.head_dim, "group": arch.query_heads // arch.kv_groups * arch.head_dim}[span]
    return list(range(unit * width, (unit + 1) * width))


def owned(model, arch, kind):
    """{parameter name: (dimension, indices)} of unit UNIT at layer LAYER, as the family's table says."""
    found = {}
    prefix = f"{arch.family.layers}.{LAYER}"
    for part in arch.family.units[kind]:
        if isinstance(part, Writers):
            prefix = f"{arch.family.layers}.{UNIT}."
            return {name: (0, range(p.shape[0])) for name, p in model.named_parameters() if name.startswith(prefix)}
        path = f"{prefix}.{arch.family.modules[part.role]}"
        if isinstance(part, Rows):
            found[f"{path}.weight"] = (0, features(arch, part.span, UNIT))
            if model.get_submodule(path).bias is not None:
                found[f"{path}.bias"] = (0, features(arch, part.span, UNIT))
        else:
            assert isinstance(part, Columns)
            found[f"{path}.weight"] = (1, features(arch, part.span, UNIT))
    return found


def close_one(model, arch, kind):
    """Closes unit UNIT of the kind and nothing else."""
    gates = GateSet(model, sites(arch, [kind]))
    gates.attach()
    name = "layers" if kind == "layers" else site_name(LAYER, kind)
    [site] = [site for site in gates.sites if site.name == name]
    value = torch.ones(site.size)
    value[UNIT] = 0.0
    gates.set({name: value})
    return gates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", FULLEST)
def test_randomising_a_closed_unit_does_not_move_the_output(variant, kind):
    model_type, changes = VARIANTS[variant]
    model = tiny_model(model_type, **changes)
    arch = describe(model.config)
    open_ = logits(model)
    close_one(model, arch, kind)
    before = logits(model)
    assert (before - open_).abs().max() > 1e-3, "the gate must close something"
    parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(1)
    for name, (dimension, indices) in owned(model, arch, kind).items():
        values = parameters[name].data
        rows = values if dimension == 0 else values.T
        rows[list(indices)] = torch.randn(rows[list(indices)].shape, generator=generator)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", FULLEST)
def test_everything_outside_a_closed_unit_still_matters(variant, kind):
    """Exhaustive converse: over all layers, exactly the rows and columns in the table have no gradient."""
    model_type, changes = VARIANTS[variant]
    model = tiny_model(model_type, **changes)
    arch = describe(model.config)
    close_one(model, arch, kind)
    out = model(**batch()).logits
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    table = owned(model, arch, kind)
    for name, parameter in model.named_parameters():
        if not name.startswith(arch.family.layers):
            continue
        dimension, indices = table.get(name, (0, ()))
        for axis in range(parameter.dim()):
            size = parameter.grad.transpose(0, axis).reshape(parameter.shape[axis], -1).abs().amax(1)
            dead = set(torch.nonzero(size == 0).flatten().tolist())
            whole = len(indices) == parameter.shape[dimension]
            expected = set(range(parameter.shape[axis])) if whole else set(indices) if axis == dimension else set()
            assert dead == expected, (name, axis)


@pytest.mark.parametrize("kind", ["mlp_channels", "kv_groups", "query_heads"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_randomising_a_row_outside_the_table_moves_the_output(model_type, kind):
    model = tiny_model(model_type)
    arch = describe(model.config)
    close_one(model, arch, kind)
    before, table = logits(model), owned(model, arch, kind)
    for name, (dimension, indices) in table.items():
        values = model.get_parameter(name).data
        rows = values if dimension == 0 else values.T
        for outside in (min(indices) - 1, max(indices) + 1):
            kept = rows[outside].clone()
            rows[outside] = torch.randn(kept.shape, generator=torch.Generator().manual_seed(3))
            assert (logits(model) - before).abs().max() > 1e-5, (name, outside)
            rows[outside] = kept


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sites_cover_every_unit_once(model_type):
    arch = describe(tiny_config(model_type))
    found = sites(arch, KINDS)
    assert len({site.name for site in found}) == len(found) == 3 * arch.layers + 1
    model = tiny_model(model_type)
    for site in found:
        assert parse_site(site.name) == (site.layer, site.kind)
        assert len(site.gated) == (2 * arch.layers if site.kind == "layers" else 1)
        for path in site.gated:
            module = model.get_submodule(path)
            if site.kind != "layers":
                assert module.in_features == site.size * site.block
    assert [site.name for site in sites(arch, ["layers"])] == ["layers"]


def test_every_registered_family_is_covered_by_these_tests():
    assert {kind for _, family in FAMILIES.items() for kind in family.model_types} == set(MODEL_TYPES)
    for name, family in FAMILIES.items():
        assert set(family.units) == set(KINDS), name
        assert set(family.modules) == set(family.ROLES), name


@pytest.mark.parametrize(
    "name", ["layers.x.mlp_channels", "layers.1.experts", "layers.3.layers", "layer.1.kv_groups", "layers.01.kv_groups",
             "layers.1.kv_groups\n", "layers.١.kv_groups", "", "layers."]
)  # fmt: skip
def test_names_that_are_no_site_are_refused(name):
    with pytest.raises(ValueError, match="not the name of a site"):
        parse_site(name)


def test_unknown_architecture_is_refused_naming_the_roles():
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' has no unit table.*llama.*q, k, v, o, gate, up, down"):
        describe({"model_type": "gpt2", "n_embd": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": [64, 32, 64]}, "intermediate_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 4}, "6 query heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_configs_that_say_too_little_are_refused(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        describe({**tiny_config().to_dict(), **changes})


def test_a_model_class_without_the_named_modules_is_refused():
    model = tiny_model()
    del model.model.layers[2].mlp.down_proj
    gates = GateSet(model, sites(describe(model.config), ["mlp_channels"]))
    with pytest.raises(UnsupportedModelError, match="down_proj"):
        gates.attach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
