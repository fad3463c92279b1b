"""Second moments: of the dense inputs, of real tokens only, in float32."""

from __future__ import annotations

import pytest
import torch

from prunetune.model.architecture import describe
from prunetune.model.gates import GateSet
from prunetune.model.statistics import SecondMoments, in_groups
from prunetune.model.units import sites
from tests.support import batch, tiny_model

PATHS = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]


def inputs_of(model, path, inputs):
    """Rows (T, F) that reach a linear, padding left out."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0][inputs["attention_mask"].bool()]


def test_sums_and_tokens_without_padding():
    model = tiny_model()
    batches = [batch(3, 9, padding=2, seed=seed) for seed in (0, 1)]
    moments = SecondMoments(model, PATHS)
    moments.run(lambda inputs: model(**inputs), batches)
    assert moments.tokens == 2 * (9 + 7 + 5)
    for path in PATHS:
        rows = torch.cat([inputs_of(model, path, inputs) for inputs in batches])
        assert rows.shape[0] == moments.tokens
        torch.testing.assert_close(moments.sums[path], rows.T @ rows, atol=1e-4, rtol=1e-5)


def test_several_runs_add_up():
    model = tiny_model()
    batches = [batch(2, 9, seed=seed) for seed in (0, 1)]
    at_once, in_turn = SecondMoments(model, PATHS), SecondMoments(model, PATHS)
    at_once.run(lambda inputs: model(**inputs), batches)
    for inputs in batches:
        in_turn.run(lambda inputs: model(**inputs), [inputs])
    assert in_turn.tokens == at_once.tokens
    assert all(torch.equal(in_turn.sums[path], at_once.sums[path]) for path in PATHS)


def test_without_a_mask_every_token_counts():
    model = tiny_model()
    inputs = {"input_ids": batch(2, 9)["input_ids"]}
    moments = SecondMoments(model, PATHS[:1])
    moments.run(lambda inputs: model(**inputs), [inputs])
    assert moments.tokens == 18
    rows = inputs_of(model, PATHS[0], batch(2, 9))
    torch.testing.assert_close(moments.sums[PATHS[0]], rows.T @ rows, atol=1e-4, rtol=1e-5)


def test_padding_that_is_not_finite_does_not_spoil_the_sums():
    model = tiny_model()
    inputs = batch(2, 9, padding=4)
    moments = SecondMoments(model, PATHS[:1])

    def spoil(module, args):
        return (args[0].masked_fill((inputs["attention_mask"] == 0)[..., None], float("nan")),)

    model.get_submodule("model.layers.0.mlp.act_fn").register_forward_pre_hook(spoil)
    moments.run(lambda inputs: model(**inputs), [inputs])
    assert torch.isfinite(moments.sums[PATHS[0]]).all()


@pytest.mark.parametrize("closed", ["layers.0.mlp_channels", "layers.1.kv_groups"])
def test_inputs_are_taken_before_the_gates(closed):
    model = tiny_model()
    path = PATHS[0] if "mlp" in closed else PATHS[1]
    dense = SecondMoments(model, [path])
    dense.run(lambda inputs: model(**inputs), [batch()])
    gates = GateSet(model, sites(describe(model.config), ("mlp_channels", "kv_groups", "query_heads")))
    gates.attach()
    gates.set({closed: torch.zeros_like(gates.values()[closed])})
    masked = SecondMoments(model, [path])
    masked.run(lambda inputs: model(**inputs), [batch()])
    torch.testing.assert_close(masked.sums[path], dense.sums[path])


def test_sixteen_bit_inputs_are_summed_in_float32():
    model = tiny_model().to(torch.bfloat16)
    moments = SecondMoments(model, PATHS[:1])
    moments.run(lambda inputs: model(**inputs), [batch()])
    assert moments.sums[PATHS[0]].dtype == torch.float32
    rows = inputs_of(model, PATHS[0], batch()).float()
    torch.testing.assert_close(moments.sums[PATHS[0]], rows.T @ rows)


def test_hooks_leave_even_after_an_error():
    model = tiny_model()
    moments = SecondMoments(model, PATHS)
    with pytest.raises(RuntimeError, match="on the way"):
        moments.run(lambda inputs: (_ for _ in ()).throw(RuntimeError("on the way")), [batch()])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_linears_are_grouped_by_what_their_sums_need():
    widths = {"a": 10, "b": 10, "c": 20, "d": 5}
    assert list(in_groups(list(widths), widths.__getitem__, 800)) == [["a", "b"], ["c"], ["d"]]
    assert list(in_groups(list(widths), widths.__getitem__, 1)) == [["a"], ["b"], ["c"], ["d"]]
    assert list(in_groups(list(widths), widths.__getitem__, 10**9)) == [["a", "b", "c", "d"]]
    assert list(in_groups([], widths.__getitem__, 10)) == []


def test_sums_stay_in_float32_under_autocast():
    """Rounded to 16 bit the sums would not be positive definite, and no refit could be solved from them."""
    model = tiny_model()
    moments = SecondMoments(model, PATHS)

    def forward(inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs)

    moments.run(forward, [batch(4, 16)])
    for total in moments.sums.values():
        assert total.dtype == torch.float32
        # Sums of products of 16-bit numbers that were themselves rounded to 16 bit would all survive this.
        assert not torch.equal(total, total.bfloat16().float())
        assert torch.linalg.eigvalsh(total.double()).min() > -1e-4 * total.diagonal().max()
