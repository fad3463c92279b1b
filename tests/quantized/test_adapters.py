"""Masks that read weights see those of a quantised base as they act: dequantised, adapters added."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prunetune.methods.masks.lora_gradient import importance_by_module
from prunetune.model.adapters import AdapterView
from prunetune.model.architecture import describe
from prunetune.model.quantized import in_floats, keep_format
from prunetune.model.surgery import base_model
from prunetune.model.units import sites
from tests.quantized.quantized_runs import load, quantized_folder
from tests.support import batch


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_and_importance_equal_those_of_the_same_model_in_floats(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = load(quantized_folder(tmp_path / "base"), kind)
    keep_format(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    arch = describe(base_model(model).config)
    view = AdapterView(model, arch, sites(arch, ("mlp_channels", "kv_groups")))
    ids = batch(2, 11)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    found = importance_by_module(view.linears)
    for linear in view.linears:
        x_1I = torch.randn(1, linear.weight().shape[1])
        torch.testing.assert_close(linear.module(x_1I), x_1I @ linear.weight().T, rtol=0.05, atol=0.05)
    with in_floats(model):
        plain = AdapterView(model, arch, sites(arch, ("mlp_channels", "kv_groups")))
        for key, value in importance_by_module(plain.linears).items():
            assert bool(value.any())
            torch.testing.assert_close(found[key], value)
