"""The divergence in blocks against the same from whole logits: values, gradients, temperature, softcap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunetune.model.distillation import token_divergence


def inputs(tokens=7, width=6, vocabulary=33, bias=False):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=bias).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    student, teacher = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    return head, student.requires_grad_(), teacher


@pytest.mark.parametrize("block", [1, 400, 2**20])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradients_equal_those_from_whole_logits(temperature, softcap, block):
    head, student, teacher = inputs(bias=softcap is None)

    def logits(hidden):
        found = head(hidden)
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    weights = torch.linspace(0.5, 2.0, len(student))
    logp, logq = ((logits(hidden) / temperature).log_softmax(-1) for hidden in (teacher, student))
    whole = temperature**2 * nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    [expected] = torch.autograd.grad((weights * whole).sum(), [student])
    found = token_divergence(head, student, teacher, temperature=temperature, softcap=softcap, block_bytes=block)
    [grad] = torch.autograd.grad((weights * found).sum(), [student])
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_equal_hidden_states_are_no_distance_apart():
    head, student, _ = inputs()
    found = token_divergence(head, student, student.detach())
    assert float(found.abs().max()) < 1e-6
    [grad] = torch.autograd.grad(found.sum(), [student])
    assert float(grad.abs().max()) < 1e-6


def test_no_tokens_are_no_loss():
    head, student, teacher = inputs(tokens=0)
    found = token_divergence(head, student, teacher)
    assert found.shape == (0,)
    found.sum().backward()


def test_bfloat16_hidden_states_get_bfloat16_gradients():
    head, student, teacher = inputs()
    half = student.detach().bfloat16().requires_grad_()
    found = token_divergence(head, half, teacher.bfloat16())
    assert found.dtype == torch.float32
    found.sum().backward()
    assert half.grad.dtype == torch.bfloat16
