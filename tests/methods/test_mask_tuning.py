"""mask_tuning and bias against direct computations."""

from __future__ import annotations

import torch

from prunetune.methods.compensation import build_compensation


def problem(tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_TF = torch.randn(tokens, 9, generator=generator) @ torch.randn(9, 9, generator=generator) + 0.5
    return torch.randn(5, 9, generator=generator), x_TF, torch.tensor([0, 2, 3, 6, 8])


def test_factors_are_the_least_squares_ones() -> None:
    """Without ridge they solve min |X_S diag(m) W_S^T - X W^T|^2, here written out as one tall system in m."""
    weight_DF, x_TF, kept = problem()
    found = build_compensation("mask_tuning", {"ridge": 1e-9}).weight(weight_DF, kept, x_TF.T @ x_TF)
    columns = [torch.outer(x_TF[:, j], weight_DF[:, j]).flatten() for j in kept.tolist()]
    target = (x_TF @ weight_DF.T).flatten().double()
    factors = torch.linalg.lstsq(torch.stack(columns, dim=1).double(), target[:, None]).solution[:, 0]
    torch.testing.assert_close(found, weight_DF[:, kept] * factors.float(), atol=1e-4, rtol=1e-4)


def test_the_ridge_pulls_to_the_weights_as_they_are() -> None:
    weight_DF, x_TF, kept = problem()
    moment = x_TF.T @ x_TF
    near, far = (build_compensation("mask_tuning", {"ridge": r}).weight(weight_DF, kept, moment) for r in (1e6, 1e-6))
    torch.testing.assert_close(near, weight_DF[:, kept], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(far, weight_DF[:, kept], atol=1e-2)


def test_bias_is_the_best_change_of_the_bias_alone() -> None:
    weight_DF, x_TF, kept = problem()
    method = build_compensation("bias", {}, one_shot=True)
    found_D = method.bias(weight_DF, kept, x_TF.mean(0))
    missing_TD = x_TF @ weight_DF.T - x_TF[:, kept] @ weight_DF[:, kept].T
    torch.testing.assert_close(found_D, missing_TD.mean(0), atol=1e-4, rtol=1e-4)
    assert torch.equal(method.weight(weight_DF, kept, None), weight_DF[:, kept])


def test_bias_is_exact_where_the_removed_inputs_are_constant() -> None:
    weight_DF, x_TF, kept = problem()
    gone = [j for j in range(9) if j not in kept.tolist()]
    x_TF = x_TF.clone()
    x_TF[:, gone] = torch.randn(len(gone), generator=torch.Generator().manual_seed(2))
    bias_D = build_compensation("bias", {}, one_shot=True).bias(weight_DF, kept, x_TF.mean(0))
    torch.testing.assert_close(x_TF[:, kept] @ weight_DF[:, kept].T + bias_D, x_TF @ weight_DF.T, atol=1e-4, rtol=1e-4)
