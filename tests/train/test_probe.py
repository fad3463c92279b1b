"""The probe at the freeze is exact where the model itself rounds."""

from __future__ import annotations

import pytest
import torch

from prunetune.train.probe import _in_float64
from tests.support import MODEL_TYPES, tiny_model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_norms_keep_float64(model_type: str) -> None:
    model = tiny_model(model_type)
    norm = model.model.norm
    x = 1e3 * torch.randn(2, 3, model.config.hidden_size, dtype=torch.float64, generator=torch.manual_seed(0))
    with torch.no_grad():
        rounded = norm(x.float()).double()
        with _in_float64(model):
            found = norm(x)
            again = norm(7.0 * x / 7.0)
        outside = norm(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, rounded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, again, rtol=1e-13, atol=1e-13)
    assert not torch.equal(found, outside.double()), "in float32 again"
    assert float((found - rounded).abs().max()) > 1e-9, "float32 rounds"
