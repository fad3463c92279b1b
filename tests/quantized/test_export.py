"""Exports of quantised runs: merged onto what was trained or onto the original weights, measured, reloaded by stock."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunetune.config.load import load_config
from prunetune.core.errors import ConfigError, ExportError, UnsupportedModelError
from prunetune.export import merge_base
from prunetune.export.write import export_model
from prunetune.model.architecture import describe
from prunetune.model.plan import Plan
from prunetune.model.quantized import in_floats, quantized_linears
from prunetune.model.resolve import resolve_model
from prunetune.model.source import SourceWeights
from prunetune.model.surgery import Surgery, base_model
from prunetune.pipeline.export_run import export_run
from prunetune.pipeline.loading import load_trained
from prunetune.pipeline.run import RunReport
from prunetune.pipeline.run import run as run_pipeline
from prunetune.pipeline.trainer import PruneTuneTrainer
from prunetune.train.freeze import load_updates
from prunetune.train.settings import quantization
from tests.quantized.quantized_runs import KINDS, load, prune_config, quantized_folder
from tests.support import logits, tiny_rows, tiny_tokenizer, write_rows
from tests.train.joint_runs import lora, rows, sft_args


def configuration(root: Path, **changes: Any) -> Any:
    """A run of 6 steps on a tiny nf4 base."""
    values: dict[str, Any] = {
        "model": {"name": str(root / "model"), "quantize": "nf4"},
        "data": {"train": str(root / "rows.jsonl"), "validation_fraction": 0.2},
        "target": "70%",
        "compensation": {"method": "refit", "tokens": 256},
        "train": {"max_steps": 6, "batch_size": 4, "max_length": 32, "bf16": False, "learning_rate": 1e-2},
        "lora": {"rank": 4},
        "evaluate": {"enabled": False},
        "export": {"dtype": "float32"},
        "folder": str(root / "run"),
    }
    (root / "run.yaml").write_text(json.dumps({**values, **changes}))
    return load_config(root / "run.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    quantized_folder(root / "model")
    write_rows(root / "rows.jsonl", tiny_rows(60))
    return root


@pytest.fixture(scope="module")
def done(root: Path) -> RunReport:
    torch.set_num_threads(1)
    return run_pipeline(configuration(root))


def trained(root: Path) -> tuple[Any, Plan]:
    """The run's model as its last checkpoint has it."""
    config = configuration(root)
    model, plan = load_trained(root / "run", resolve_model(str(root / "model")), "float32", quantization(config))
    return model.eval(), plan


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prunetune.json").read_text())


def test_export_is_the_model_that_was_trained(done: RunReport, root: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(done.folder / "compact", dtype=torch.float32).eval()
    assert not hasattr(stock.config, "quantization_config")
    model, _ = trained(root)
    assert quantized_linears(model)
    assert float((logits(stock) - logits(model)).abs().max()) <= 1e-4
    found = facts(done.folder / "compact")
    assert found["metadata"]["merged_onto"] == "the dequantised nf4 weights that were trained with"
    difference = found["verification"]["from_trained"]
    card = (done.folder / "README.md").read_text()
    assert "the adapters are merged onto the dequantised nf4 weights that were trained with" in card
    assert f"against the trained model: kl: {difference['kl']:.3g}" in card
    assert difference["kl"] < 1e-3
    assert difference["agreement"] > 0.9
    assert found["verification"]["merge_difference"] <= 1e-4


def test_export_onto_the_original_weights(done: RunReport, root: Path, capsys: Any) -> None:
    export_run(done.folder, root / "source", base="source")
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "merged onto the original weights, not the nf4 ones that were trained with" in said
    found = facts(root / "source")
    stated = re.search(r"against the quantised model that was trained: ([\d.e-]+) nats a token", said)
    assert stated
    assert float(stated[1]) == pytest.approx(found["verification"]["from_trained"]["kl"], rel=0.1)
    assert (
        found["verification"]["from_trained"]["kl"]
        > 10 * facts(done.folder / "compact")["verification"]["from_trained"]["kl"]
    )
    model, plan = trained(root)
    dense = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    surgery, updates = Surgery(describe(dense.config), plan), load_updates(root / "run" / "train" / "freeze")
    written = load_file(root / "source" / "model.safetensors")
    base = base_model(model)
    for path, cut in surgery.cuts.items():
        layer = base.get_submodule(surgery.sliced_path(path))
        weight = updates.get(path)
        if weight is None:
            weight = cut.apply("weight", dense.get_submodule(path).weight.detach())
        wanted = weight + layer.get_delta_weight("default").detach()
        torch.testing.assert_close(written[f"{surgery.sliced_path(path)}.weight"], wanted, atol=1e-6, rtol=1e-5)


def test_linears_whose_adapter_has_left_are_exported_as_they_were_trained(root: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "ranks": {"method": "light_peft", "modules": "30%"}}
    config = configuration(root, folder=str(tmp_path / "run"), lora=lora, export={"dtype": "float32", "verify": False})
    done = run_pipeline(config)
    model, _ = load_trained(done.folder, resolve_model(str(root / "model")), "float32", quantization(config))
    assert any(not path.endswith("base_layer") for path in quantized_linears(model)), "an adapter has left"
    stock = AutoModelForCausalLM.from_pretrained(done.folder / "compact", dtype=torch.float32).eval()
    assert float((logits(stock) - logits(model.eval())).abs().max()) <= 1e-4


@pytest.mark.slow
def test_another_budget_from_the_same_scores(done: RunReport, root: Path) -> None:
    exported = export_run(done.folder, root / "half", target="45%", base="source")
    assert exported.verification["from_trained"]["kl"] < merge_base.TOLERANCE
    smaller = AutoModelForCausalLM.from_pretrained(root / "half")
    assert smaller.num_parameters() < AutoModelForCausalLM.from_pretrained(done.folder / "compact").num_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_weights_are_far_beyond_the_tolerance(tmp_path: Path, kind: str) -> None:
    """What the tolerance has to tell apart: rounding moves even a random model less, other weights move it far more."""
    torch.manual_seed(0)
    base = load(quantized_folder(tmp_path / "base"), kind)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).eval()
    prompts = [list(range(5, 40)), list(range(60, 95))]
    wanted = merge_base.trained_logits(model, prompts)
    assert wanted is not None

    def measure(source: SourceWeights) -> dict[str, Any]:
        with merge_base.merging_onto(model, source), torch.no_grad():
            found = [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
        return merge_base.difference_to_trained(wanted, found)

    assert measure(SourceWeights(model))["kl"] < merge_base.TOLERANCE
    model.config._name_or_path = base.config._name_or_path = str(quantized_folder(tmp_path / "other", seed=3))
    with pytest.raises(ExportError, match=r"[1-9][.\d]* nats a token away .* another model.*export.base: trained"):
        measure(SourceWeights(model))


def test_python_api_with_a_users_own_model(tmp_path: Path) -> None:
    trainer = PruneTuneTrainer(
        load(quantized_folder(tmp_path / "base"), "int8"),
        sft_args(tmp_path / "run"),
        prune=prune_config(),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    trainer.train()
    assert trainer.export(tmp_path / "compact", dtype="float32", verify=False) is not None
    with in_floats(trainer.model):
        wanted = logits(trainer.model.eval())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=torch.float32).eval()
    assert float((logits(stock) - wanted).abs().max()) <= 1e-4
    assert trainer.export(tmp_path / "source", base="source", verify=False) is not None
    assert facts(tmp_path / "source")["metadata"]["merged_onto"].startswith("the original weights")


def test_unquantised_models_have_one_base(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="not quantised"):
        export_model(model, None, tmp_path / "out", source=SourceWeights(model))
    export_model(model, None, tmp_path / "plain", verify=False)
    assert "merged_onto" not in facts(tmp_path / "plain")["metadata"]


def test_settings_are_checked(root: Path, done: RunReport, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"export.base: is source.*set model.quantize"):
        configuration(root, model={"name": str(root / "model")}, export={"base": "source"})

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"model.quantize: nf4 needs bitsandbytes; pip install 'bitsandbytes>=0.50"):
        configuration(root)
    configuration(root, model={"name": str(root / "model")})
