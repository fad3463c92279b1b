"""The contract of every registered score, found by discovery: a new file under methods/scores is tested at once."""

from __future__ import annotations

import pytest
import torch

from prunetune.core.errors import ConfigError
from prunetune.methods.scores import NEEDS, SCORES, LayerScore, ModelScore, ScoreContext, build_score, check_score
from prunetune.model.units import KINDS, kind_size, sites
from tests.contracts.scores import collected, world

NAMES = SCORES.names()
by_name = pytest.mark.parametrize("name", NAMES)
# One kind of units at a time, and all that a score can rank together.
by_units = pytest.mark.parametrize(
    ("name", "kinds"),
    [(name, (kind,)) for name in NAMES for kind in SCORES.get(name).kinds]
    + [(name, SCORES.get(name).kinds) for name in NAMES if len(SCORES.get(name).kinds) > 1],
)


def test_the_methods_are_found():
    assert {
        "amp",
        "block_influence",
        "cfsp",
        "fisher",
        "fluctuation",
        "magnitude",
        "nirvana",
        "output_divergence",
        "peak_to_peak",
        "random",
        "taylor",
        "wanda",
    } <= set(NAMES)


@by_name
def test_docstring_and_facts(name):
    kind = SCORES.get(name)
    assert issubclass(kind, LayerScore | ModelScore)
    summary = SCORES.summary(name)
    assert summary == kind.__dict__["__doc__"].strip().splitlines()[0]
    assert summary.endswith((".", ":"))
    assert 20 <= len(summary) <= 120
    assert kind.needs <= NEEDS
    assert kind.cost
    assert set(kind.kinds) <= set(KINDS)
    assert kind.paper.startswith("arXiv") or name == "random"
    assert issubclass(kind, ModelScore) == ("loads the whole model" in kind.cost)
    assert all(field.description for field in kind.Options.model_fields.values())


@by_units
def test_scores_are_finite_and_shaped(name, kinds):
    of = world()
    score = collected(name, kinds)
    for site in sites(of.arch, kinds):
        found = score.score(site)
        assert found.shape == (kind_size(of.arch, site.kind),)
        assert found.dtype == torch.float32
        assert found.device.type == "cpu"
        assert not found.requires_grad
        assert torch.isfinite(found).all()
        assert (found >= 0).all(), "allocations add up what leaves: a negative score would make leaving a gain"
    assert score.scores().keys() == {site.name for site in sites(of.arch, kinds)}
    assert len(torch.cat(list(score.scores().values())).unique()) > 2, "it tells units apart"


@by_name
def test_deterministic_and_global_generators_left_alone(name):
    before = torch.get_rng_state()
    first, second = (collected(name, SCORES.get(name).kinds[:1]).scores() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[site], second[site]) for site in first)


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(SCORES.get(name), ModelScore)])
def test_the_model_is_handed_back_as_it_was(name):
    of = world()
    before = {key: tensor.clone() for key, tensor in of.model.state_dict().items()}
    collected(name, SCORES.get(name).kinds)
    assert all(torch.equal(tensor, before[key]) for key, tensor in of.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in of.model.parameters())
    assert all(parameter.grad is None for parameter in of.model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in of.model.modules())


@by_name
def test_kinds_that_it_cannot_rank_are_refused(name):
    arch = world().arch
    for kind in set(KINDS) - set(SCORES.get(name).kinds):
        with pytest.raises(ConfigError, match=f"{name} ranks .*, not {kind}"):
            build_score(name, {}, ScoreContext(arch, sites(arch, [kind]), 0))


@by_name
def test_unknown_options_are_refused_with_a_suggestion(name):
    known = next(iter(SCORES.get(name).Options.model_fields), None)
    [problem] = check_score(name, {f"{known or 'x'}s": 1})
    assert f"score.{known or 'x'}s" in str(problem)
    assert (f"did you mean {known!r}" if known else "it has no options") in str(problem)
    assert check_score(name, {}) == []


def test_unknown_scores_are_refused_with_a_suggestion():
    assert "did you mean 'wanda'" in str(check_score("wandaa", {})[0])


def test_random_is_a_control_that_the_seed_decides():
    drawn = [collected("random", ("mlp_channels",), seed=seed).scores()["layers.1.mlp_channels"] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
