"""What `prunetune plan` says of quantised bases, and how they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunetune.config.schema import RunConfig
from prunetune.model.architecture import describe
from prunetune.model.budget import decoder_params, full_shape, total_params
from prunetune.model.quantized import quantized_linears, size_bytes
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import _place, load_for_training
from prunetune.pipeline.memory import training_memory
from prunetune.pipeline.plan_run import plan_run
from prunetune.train.settings import quantization
from tests.quantized.quantized_runs import KINDS, quantized_folder

# Wide enough that the tables of codes, of which every weight has one, do not count.
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_folder(tmp_path_factory.mktemp("base"), **WIDE)


def configuration(folder: Path, kind: str | None, **train: object) -> RunConfig:
    model = {"name": str(folder), "quantize": kind, "dtype": "bfloat16"}
    return RunConfig(model=model, target="60%", train={"max_steps": 10, **train})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_estimated_base_is_what_is_loaded(folder: Path, kind: str) -> None:
    config = configuration(folder, kind)
    model = load_for_training(resolve_model(str(folder)), "bfloat16", quantization(config))
    linears = quantized_linears(model)
    real = sum(size_bytes(layer) for layer in linears.values())
    inside = {id(parameter) for layer in linears.values() for parameter in layer.parameters()}
    real += sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    arch = describe(model.config)
    parts = training_memory(arch, full_shape(arch), config, gpu=False)
    assert parts["base weights"] == pytest.approx(real, rel=0.01)
    assert "bfloat16 copies of them" not in parts
    assert parts["one weight, dequantised"] == 1024 * 512 * 2


def test_plan_counts_the_smaller_base(folder: Path) -> None:
    plain, small = plan_run(configuration(folder, None)), plan_run(configuration(folder, "nf4"))
    arch = small.architecture
    linears, total = decoder_params(arch, full_shape(arch)), total_params(arch, full_shape(arch))
    saved = plain.dense.memory["base weights"] - small.dense.memory["base weights"]
    assert saved == pytest.approx(linears * (2 - 0.5159), rel=1e-3)
    assert plain.dense.memory["base weights"] == 2 * total
    assert small.dense.size_bytes == plain.dense.size_bytes, "the export is in 16 bit"


def test_base_goes_straight_to_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _place() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _place() == {"": 1}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert _place() is None, "the engine spreads the weights itself"
