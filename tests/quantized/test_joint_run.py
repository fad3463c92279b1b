"""Joint runs on quantised bases: plain QLoRA with open gates, the freeze from 16-bit shards, resumption, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from prunetune.core.errors import ConfigError, UnsupportedModelError
from prunetune.model.architecture import describe
from prunetune.model.plan import Plan
from prunetune.model.quantized import quantize_like, quantized_linears, weight_of
from prunetune.model.source import SourceWeights
from prunetune.model.surgery import Surgery, base_model
from prunetune.train.freeze import load_updates
from prunetune.train.trainer import JointTrainer
from tests.invariance.test_open_gates import history
from tests.quantized.quantized_runs import load, prune_config, quantized_folder
from tests.support import tiny_tokenizer
from tests.train.joint_runs import joint_trainer, lora, require_same, rows, sft_args, weights

REFIT = prune_config(compensation={"method": "refit", "tokens": 256})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> JointTrainer:
    """A finished nf4 run with compensation."""
    torch.set_num_threads(1)
    trainer = run(tmp_path_factory.mktemp("whole"), load(folder, "nf4"), REFIT)
    trainer.train()
    return trainer


def run(out: Path, model: Any, prune: Any = None, **changes: Any) -> JointTrainer:
    """A trainer of 8 steps."""
    return joint_trainer(out, model=model, prune=prune or prune_config(), **changes)


def values(trainer: Any) -> dict[str, torch.Tensor]:
    """Every weight of the live model as numbers, quantised ones included."""
    linears = {f"{path}.weight": weight_of(layer) for path, layer in quantized_linears(trainer.model).items()}
    return {**weights(trainer), **linears}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_open_gates_equal_plain_qlora_step_by_step(tmp_path: Path, folder: Path, kind: str) -> None:
    plain = SFTTrainer(
        model=load(folder, kind),
        args=sft_args(tmp_path / "plain"),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    for parameter in plain.model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16
            parameter.data = parameter.data.float()  # TRL rounds them; see QuantizedTrainer
    plain.train()
    joint = run(tmp_path / "joint", load(folder, kind), prune_config(kept="100%"))
    joint.train()
    assert (tmp_path / "joint" / "freeze" / "checkpoint").is_dir(), "the run went through its freeze"
    assert history(joint) == history(plain)
    require_same(values(joint), values(plain))


def test_precisions_are_kept(tmp_path: Path, folder: Path) -> None:
    trainer = run(tmp_path, load(folder, "nf4"), prune_config(mask="hard_concrete"))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    seen: list[torch.dtype] = []
    step = trainer.before_optimizer_step

    def watched(number: int) -> None:
        search = trainer._search
        if search is not None:
            seen.extend(value.dtype for value in search.gate_set.values().values())
            seen.extend(t.dtype for t in search.mask.state_dict().values() if t.is_floating_point())
        step(number)

    trainer.before_optimizer_step = watched  # type: ignore[method-assign]
    trainer.train()
    assert seen
    assert set(seen) <= {torch.float32, torch.float64}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_freeze_quantises_the_cut_source_again(tmp_path: Path, folder: Path, kind: str, capsys: Any) -> None:
    trainer = run(tmp_path, load(folder, kind), REFIT)
    original = quantized_linears(load(folder, kind))
    trainer.train()
    assert trainer.plan is not None
    surgery, updates = Surgery(trainer.dense, trainer.plan), load_updates(tmp_path / "freeze")
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = base_model(trainer.model)
    assert set(updates) == {path for path, cut in surgery.cuts.items() if cut.columns is not None}
    assert updates
    for path, cut in surgery.cuts.items():
        wanted = updates[path] if path in updates else cut.apply("weight", source.get_submodule(path).weight.detach())
        layer = base.get_submodule(f"{path}.base_layer")
        assert type(layer) is type(original[path])
        assert torch.equal(weight_of(layer), weight_of(quantize_like(original[path], wanted)))
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    error, moved = re.search(r"quantised again: weights within ([\d.]+)%.*?by ([\d.e-]+) nats", said).groups()  # type: ignore[union-attr]
    assert 0 < float(error) < 25
    assert 0 < float(moved) < 1


def test_compensation_starts_from_what_was_trained_with(tmp_path: Path, folder: Path) -> None:
    """Refit solves for the effective weight, which is the dequantised base and the delta, not the 16-bit base."""
    trainer = run(tmp_path, load(folder, "fp4"), REFIT)
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    solve = trainer.compensation.weight

    def watched(weight: torch.Tensor, kept: torch.Tensor, moment: Any) -> torch.Tensor:
        seen.setdefault(tuple(weight.shape), []).append(weight)
        return solve(weight, kept, moment)

    trainer.compensation.weight = watched  # type: ignore[method-assign]
    dense = {path: weight_of(layer) for path, layer in quantized_linears(base_model(trainer.model)).items()}
    deltas: dict[str, torch.Tensor] = {}
    cut = trainer.cut

    def before_cut(plan: Plan, *rest: Any) -> Any:
        for path in dense:
            layer = base_model(trainer.model).get_submodule(path.removesuffix(".base_layer"))
            deltas[path] = layer.get_delta_weight("default").detach().float()
        return cut(plan, *rest)

    trainer.cut = before_cut  # type: ignore[method-assign]
    trainer.train()
    path = "model.layers.0.mlp.down_proj.base_layer"
    assert bool(deltas[path].any())
    assert torch.equal(seen[(64, 192)][0], dense[path] + deltas[path])


@pytest.mark.parametrize("stop", [3, 6])
def test_resumed_run_equals_uninterrupted(tmp_path: Path, folder: Path, whole: JointTrainer, stop: int) -> None:
    first = run(tmp_path / "run", load(folder, "nf4"), REFIT)
    first.stop_after = lambda step, ask=first.stop_after: _stop(first, step, stop) or ask(step)  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = run(tmp_path / "run", load(folder, "nf4"), REFIT)
    again.train(resume_from_checkpoint=True)
    require_same(values(again), values(whole))
    assert again.plan is not None
    assert again.plan.digest() == whole.plan.digest()  # type: ignore[union-attr]


def _stop(trainer: JointTrainer, step: int, at: int) -> bool:
    if step == at:
        trainer._interruption.requested = True
    return False


def test_adapters_that_come_with_the_model_keep_their_values(tmp_path: Path, folder: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(load(folder, "nf4"), lora(init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = run(tmp_path, model, peft_config=None)
    require_same({name: p for name, p in weights(trainer).items() if name in before}, before)


# ---- what is refused, before a step is made


def test_missing_source(tmp_path: Path, folder: Path) -> None:
    model = load(folder, "nf4")
    model.config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(UnsupportedModelError, match=r"16-bit weights .* not found .*gone.*config._name_or_path"):
        run(tmp_path / "run", model)
    model = load(folder, "nf4")
    model.config._name_or_path = ""
    with pytest.raises(UnsupportedModelError, match="was made from no folder"):
        run(tmp_path / "run", model)


def test_source_of_another_model(tmp_path: Path, folder: Path) -> None:
    model = load(folder, "nf4")
    model.config._name_or_path = str(quantized_folder(tmp_path / "other", seed=1))
    with pytest.raises(UnsupportedModelError, match=r"not what .*other holds: off by 1\d\d%"):
        run(tmp_path / "run", model)
    model.config._name_or_path = str(quantized_folder(tmp_path / "wider", intermediate_size=256))
    with pytest.raises(UnsupportedModelError, match="F32 of shape"):
        run(tmp_path / "run", model)


def test_base_that_is_quantised_on_disk(tmp_path: Path, folder: Path) -> None:
    load(folder, "nf4").save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"U8 of shape .*not quantised on disk"):
        run(tmp_path / "run", model)


def test_weights_changed_after_loading(tmp_path: Path, folder: Path) -> None:
    trainer = run(tmp_path, load(folder, "nf4"))
    layer = base_model(trainer.model).get_submodule("model.layers.1.mlp.up_proj")
    layer.base_layer = quantize_like(layer.base_layer, torch.randn(192, 64))
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.up_proj is not what"):
        trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir()


def test_other_quantisers(tmp_path: Path, folder: Path) -> None:
    model = load(folder, "nf4")
    model.quantization_method = "gptq"
    with pytest.raises(ConfigError, match="quantised with gptq, whose packed weights cannot be cut"):
        run(tmp_path, model)


def test_widths_that_this_machine_cannot_read_back(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunetune.model import quantized

    monkeypatch.setattr(quantized, "_reads_back", lambda columns, *_: columns != 128)
    with pytest.raises(UnsupportedModelError, match="128 input features"):
        run(tmp_path, load(folder, "nf4"))
    run(tmp_path, load(folder, "int8"))


def test_source_weights_follow_the_plan(folder: Path) -> None:
    model = load(folder, "nf4")
    arch = describe(model.config)
    kept = {"layers": (0, 2), "layers.2.mlp_channels": tuple(range(64)), "layers.0.mlp_channels": tuple(range(64))}
    kept["layers.1.mlp_channels"] = kept["layers.0.mlp_channels"]
    surgery = Surgery(arch, Plan(kept, arch.fingerprint()))
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    update = torch.zeros(64, 64)
    source = SourceWeights(model, surgery, {"model.layers.0.mlp.down_proj": update})
    wanted = dense.model.layers[2].mlp.down_proj.weight[:, :64]
    assert torch.equal(source.weight("model.layers.1.mlp.down_proj"), wanted)
    assert source.weight("model.layers.0.mlp.down_proj") is update
    assert source.dense_path("model.layers.1.mlp.down_proj") == "model.layers.2.mlp.down_proj"
