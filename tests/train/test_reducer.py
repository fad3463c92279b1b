"""Gate statistics of all processes: averaged gradients, added squares, one message for each kind of tensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.model.gates import GateStatistics
from prunetune.train.joint import reducer


class TwoProcesses(SimpleNamespace):
    """accelerate's Accelerator on the first of two processes; the other one saw three times as much."""

    num_processes = 2

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        assert how == "sum"
        self.messages.append(tensor.dtype)
        return tensor + 3 * tensor


def statistics() -> GateStatistics:
    grad = {"a": torch.tensor([1.0, -2.0]), "map": torch.arange(4.0).reshape(2, 2).double(), "b": torch.tensor([0.5])}
    return GateStatistics(grad, {name: grad[name].square() for name in ("a", "b")})


@pytest.mark.parametrize(("scaled", "loss_scale"), [(False, None), (True, None), (True, 8.0)])
def test_statistics_are_those_of_the_global_loss(scaled: bool, loss_scale: float | None) -> None:
    scaler: Any = SimpleNamespace(get_scale=lambda: loss_scale) if loss_scale else None
    accelerator = TwoProcesses(messages=[], scaler=scaler)
    own, found = statistics(), reducer(accelerator, scaled)(statistics())
    unscale, factor = 1 / (loss_scale or 1.0), 2 if scaled else 1
    assert list(found.grad) == ["a", "map", "b"]
    assert list(found.square) == ["a", "b"]
    for name, grad in own.grad.items():
        assert torch.equal(found.grad[name], grad * unscale * 4 / 2)
    for name, square in own.square.items():
        assert torch.equal(found.square[name], square * (unscale / factor) ** 2 * 4)
    assert accelerator.messages == [torch.float32, torch.float64]


def test_one_process_sends_nothing() -> None:
    accelerator = TwoProcesses(messages=[], num_processes=1, scaler=None)
    own = statistics()
    assert reducer(accelerator, scaled_by_world=True)(own) is own
    assert not accelerator.messages
