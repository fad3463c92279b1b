"""torch's fully_shard on a gloo mesh of one process: gates work under it, and it can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from prunetune.model.gates import GateSet
from prunetune.model.sharded import changing, whole
from prunetune.model.surgery import base_model, slice_model
from prunetune.model.token_stats import evaluating, hidden_states
from prunetune.model.units import sites
from prunetune.train.engine import alike, in_forward
from prunetune.train.fsdp import undo_fully_shard
from tests.support import batch, logits, random_plan, tiny_arch, tiny_model
from tests.train.joint_runs import lora

UNITS = ("mlp_channels", "kv_groups", "query_heads", "layers")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    """One process that could be many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh: object) -> torch.nn.Module:
    """The tiny model with adapters, layer by layer under fully_shard."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), lora(lora_dropout=0.0))
    for layer in base_model(model).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def test_gates_get_the_gradients_of_a_plain_model(mesh: object) -> None:
    torch.manual_seed(1)
    found = {}
    for name, model in (("plain", get_peft_model(tiny_model(), lora(lora_dropout=0.0))), ("sharded", sharded(mesh))):
        gates = GateSet(base_model(model), sites(tiny_arch(), UNITS), record_squares=True)
        gates.attach()
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        found[name] = gates.collect()
    for site, grad in found["plain"].grad.items():
        torch.testing.assert_close(found["sharded"].grad[site], grad, msg=site)
        torch.testing.assert_close(found["sharded"].square[site], found["plain"].square[site], msg=site)


def test_undone_model_is_the_plain_one_and_can_be_sliced_and_sharded_again(mesh: object) -> None:
    model = sharded(mesh)
    classes = [cls.__name__ for cls in map(type, get_peft_model(tiny_model(), lora(lora_dropout=0.0)).modules())]
    wanted = logits(model)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    undo_fully_shard(model)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert [type(module).__name__ for module in model.modules()] == classes
    assert torch.equal(logits(model), wanted)
    slice_model(model, random_plan(tiny_arch(), UNITS))
    small = logits(model)
    model.load_state_dict(model.state_dict())  # no hook of the former sharding puts its tensors back
    for layer in base_model(model).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(logits(model), small)


def test_a_part_of_the_model_runs_in_place_of_its_forward_pass_with_whole_weights(mesh: object) -> None:
    torch.manual_seed(1)
    plain, spread = get_peft_model(tiny_model(), lora(lora_dropout=0.0)), sharded(mesh)
    found = []
    for model in (plain, spread):
        with evaluating(model), torch.no_grad():
            forward = base_model(model).forward

            def states(model: torch.nn.Module = model) -> torch.Tensor:
                return hidden_states(model, **{f"{name}_BS": part for name, part in batch().items()})[1]

            found.append(in_forward(model, states))
            assert base_model(model).forward == forward
    torch.testing.assert_close(found[1], found[0])
    assert torch.equal(logits(spread.eval()), logits(spread.eval())), "its own forward is back"


def test_what_is_changed_whole_reaches_the_parts(mesh: object) -> None:
    parameter = next(p for p in sharded(mesh).parameters() if p.requires_grad)
    wanted = 2 * whole(parameter.detach()) + 1
    with changing([parameter]) as [value]:
        value.mul_(2).add_(1)
    assert torch.equal(whole(parameter.detach()), wanted)
    plain = torch.nn.Parameter(torch.ones(3))
    with changing([plain]) as [value]:
        value.zero_()
    assert not plain.detach().any()


def test_whole_tensors_are_spread_like_their_parameter_and_back(mesh: object) -> None:
    parameter = next(p for p in sharded(mesh).parameters() if p.requires_grad)
    moment = torch.randn(parameter.shape)
    spread = alike(moment, parameter)
    assert isinstance(spread, DTensor)
    assert spread.placements == parameter.placements
    assert torch.equal(whole(spread), moment)
    assert alike(torch.tensor(3.0), parameter).dim() == 0
