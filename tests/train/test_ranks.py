"""Runs whose adapters change their ranks at the freeze: every rank method's, resumed, exported, cut anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunetune.config.presets import PhaseSteps
from prunetune.core.errors import ConfigError, DataError
from prunetune.core.sizes import parse_fraction
from prunetune.export.write import export_model
from prunetune.methods.ranks import RANKS
from prunetune.model.ranks import Ranks
from prunetune.model.surgery import Surgery, base_model, slice_model
from prunetune.train.checkpoint import load_mask
from prunetune.train.freeze import RANKS_FILE, SCORES_FILE, load_ranks
from prunetune.train.moments import Moments
from prunetune.train.ranks import RankSearch
from prunetune.train.trainer import JointTrainer
from tests.support import batch, logits, tiny_arch, tiny_model, tiny_tokenizer
from tests.train.joint_runs import (
    FREEZE_STEP,
    STEPS,
    checkpoints,
    joint_trainer,
    lora,
    metrics,
    prune_config,
    require_same,
    rows,
    timeless,
    weights,
)

UNITS = ("mlp_channels", "kv_groups", "layers")
# Whatever is registered and decides something, at half the parameters; and growth alone.
CASES: dict[str, Any] = {name: {"method": name, "kept": "50%"} for name, kind in RANKS.items() if kind.observes} | {
    "apt, growing": {"method": "apt", "kept": "200%"}
}

Run = tuple[Path, JointTrainer, str]


def trainer_of(folder: Path, case: str) -> JointTrainer:
    """Layers leave too, so that adapters get other numbers; rsLoRA, so that scales follow the root of the rank."""
    return joint_trainer(
        folder,
        prune=prune_config(units=UNITS, kept="45%", ranks=CASES[case]),
        peft_config=lora(use_rslora=True),
        eval_dataset=rows(6, seed=9),
        evaluate_at_freeze=True,
        args={"save_steps": 1},
    )


@pytest.fixture(scope="module", params=list(CASES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run that kept all its checkpoints."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of(folder, request.param)
    trainer.train()
    assert trainer.plan is not None
    assert 0 < len(trainer.plan.kept_layers(trainer.dense)) < 3
    return folder, trainer, request.param


def ranks_of(run: Run) -> Ranks:
    """What the freeze decided."""
    found = load_ranks(run[0] / "freeze")
    assert found is not None
    return found


def sliced_by_hand(run: Run) -> tuple[Surgery, dict[str, torch.Tensor]]:
    """The adapters of the freeze, cut by the plan with all their ranks, by name in PEFT's file."""
    assert run[1].plan is not None
    surgery = Surgery(tiny_arch(), run[1].plan)
    dense = load_file(run[0] / "freeze" / "adapter" / "adapter_model.safetensors")
    cut = {surgery.rename(name): surgery.slice_parameter(name, tensor) for name, tensor in dense.items()}
    return surgery, {str(name): tensor for name, tensor in cut.items() if tensor is not None}


def test_parameters_meet_the_budget_from_below(run: Run) -> None:
    now = sum(parameter.numel() for parameter in run[1].model.parameters() if parameter.requires_grad)
    before = sum(tensor.numel() for tensor in sliced_by_hand(run)[1].values())
    budget = parse_fraction(CASES[run[2]]["kept"]) * before
    assert budget - (48 + 64) < now <= budget


def test_nothing_is_seen_saved_or_changed_by_default(tmp_path: Path) -> None:
    trainer = joint_trainer(tmp_path, args={"max_steps": FREEZE_STEP + 1})
    trainer.train()
    assert not (tmp_path / "freeze" / RANKS_FILE).exists()
    assert not any(name.startswith("ranks.") for name in load_mask(tmp_path / "checkpoint-2"))
    assert not trainer.model.peft_config["default"].rank_pattern


def test_adapters_that_are_known_by_their_layers_numbers_are_found_when_layers_have_left(tmp_path: Path) -> None:
    options = {
        "prune": prune_config({"method": "saliency", "shape": "scored"}, units=UNITS, kept="45%"),
        "peft_config": lora(
            target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 2], rank_pattern={r"layers\.2\..*": 3}
        ),
    }
    trainer = joint_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.plan is not None
    assert trainer.plan.kept_layers(trainer.dense) != (0, 1, 2)
    again = joint_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FREEZE_STEP + 2}"))
    require_same(weights(again), weights(trainer))


def test_frozen_checkpoint_holds_what_stays_and_nothing_that_was_learnt_of_what_is_new(run: Run) -> None:
    ranks, (surgery, by_hand) = ranks_of(run), sliced_by_hand(run)
    frozen = run[0] / "freeze" / "checkpoint"
    adapter = load_file(frozen / "adapter_model.safetensors")
    moments, before = Moments.load(frozen), Moments.load(run[0] / f"checkpoint-{FREEZE_STEP}").sliced(surgery)
    assert sorted(moments.groups[0]["params"]) == sorted(moments.tensors)
    for path, change in ranks.changes.items():
        for axis, kind in enumerate("AB"):
            name = f"base_model.model.{path}.lora_{kind}.weight"
            assert (name in adapter) == (change.rank > 0)
            if not change.rank:
                continue
            learnt = name.replace(".weight", ".default.weight")
            kept, count = torch.tensor(change.kept, dtype=torch.long), len(change.kept)
            assert torch.equal(adapter[name].narrow(axis, 0, count), by_hand[name].index_select(axis, kept))
            assert bool(adapter[name].narrow(axis, count, change.added).any()) == (kind == "A" and change.added > 0)
            for key in ("exp_avg", "exp_avg_sq"):
                moment, old = moments.tensors[learnt][key], before.tensors[learnt][key]
                assert torch.equal(moment.narrow(axis, 0, count), old.index_select(axis, kept))
                assert not moment.narrow(axis, count, change.added).any()
            assert moments.tensors[learnt]["step"] == FREEZE_STEP


def test_evaluation_right_after_the_freeze_moves_only_by_what_leaves(run: Run) -> None:
    found = {key: entry[key] for entry in metrics(run[0]) for key in entry if key.endswith("cut_loss")}
    moved = abs(found["eval_after_cut_loss"] - found["eval_before_cut_loss"])
    shrunk = any(len(change.kept) < 4 for change in ranks_of(run).changes.values())
    assert (moved > 1e-5) == shrunk
    assert moved < 0.1


# Between the two steps that are listened to, between the last one and the freeze, right after it, and later.
@pytest.mark.parametrize(("step", "frozen"), [(3, False), (4, False), (4, True), (6, True)])
def test_resumed_run_equals_uninterrupted_run(run: Run, tmp_path: Path, step: int, frozen: bool) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    for later in checkpoints(copy):
        if later > step:
            shutil.rmtree(copy / f"checkpoint-{later}")
    if not frozen:
        shutil.rmtree(copy / "freeze")
    resumed = trainer_of(copy, run[2])
    resumed.train(resume_from_checkpoint=True)
    require_same(weights(resumed), weights(run[1]))
    assert timeless(metrics(copy)) == timeless(metrics(run[0]))


def test_stock_peft_reads_the_checkpoint_and_the_export_equals_the_live_model(run: Run, tmp_path: Path) -> None:
    folder, trainer, _ = run
    assert trainer.plan is not None
    trainer.model.eval()
    wanted, base = logits(trainer.model), tiny_model()
    slice_model(base, trainer.plan)
    stock = PeftModel.from_pretrained(base, folder / f"checkpoint-{STEPS}").eval()
    torch.testing.assert_close(logits(stock), wanted, rtol=0, atol=0)
    export_model(trainer.model, tiny_tokenizer(), tmp_path / "out", dtype="float32", plan=trainer.plan, verify=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    torch.testing.assert_close(logits(again), wanted, atol=2e-5, rtol=2e-5)


def test_another_budget_is_cut_from_the_adapters_of_the_freeze(run: Run, tmp_path: Path) -> None:
    """Ranks that left stand in freeze/adapter still: they were the dense model's."""
    freeze = run[0] / "freeze"
    other = joint_trainer(
        tmp_path,
        model=PeftModel.from_pretrained(tiny_model(), freeze / "adapter", is_trainable=True),
        peft_config=None,
        prune=prune_config(units=UNITS, kept="80%", ranks=CASES[run[2]]),
    )
    other.cut_from_scores(load_file(freeze / SCORES_FILE))
    assert {layer.r["default"] for layer in base_model(other.model).modules() if hasattr(layer, "lora_A")} == {4}


def test_output_ratio_is_the_mean_over_tokens_of_what_is_heard_while_training() -> None:
    model = get_peft_model(tiny_model(), lora(lora_dropout=0.0, init_lora_weights=False))
    search = RankSearch(model, tiny_arch(), prune_config(ranks="light_peft"), PhaseSteps(2, 6, 8))
    path, inputs, seen = "model.layers.1.mlp.up_proj", batch(), []
    layer = base_model(model).get_submodule(path)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    heard = []
    for step in range(6):
        search.begin_step(step)
        for _ in range(1 + step % 2):  # micro-batches
            model(**inputs).logits.sum().backward()
        logits(model, inputs)  # an evaluation
        search.learn(search.collect())
        model.zero_grad()
        heard.append(float(search.state_dict()[f"ranks.outputs.{path}"][1]))
    assert heard == [0, 0, 0, 0, 18, 18 + 36], "tokens of the second half"
    x, weight = seen[0], layer.base_layer.weight
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    ratio = ((x @ delta.T).norm(dim=-1) / (x @ weight.T).norm(dim=-1)).mean()
    moved, tokens = search.state_dict()[f"ranks.outputs.{path}"]
    torch.testing.assert_close(moved / tokens, ratio.detach(), rtol=1e-5, atol=0)
    search.detach()
    assert not any(module._forward_hooks for module in layer.modules())


@pytest.mark.parametrize("ranks", ["light_peft", "apt"])
def test_biases_of_adapters_are_refused(tmp_path: Path, ranks: str) -> None:
    model = tiny_model(attention_bias=True, mlp_bias=True)
    with pytest.raises(ConfigError, match=r"lora\.ranks.*set lora_bias to False"):
        joint_trainer(tmp_path, model=model, prune=prune_config(ranks=ranks), peft_config=lora(lora_bias=True))
    joint_trainer(tmp_path, model=model, prune=prune_config(), peft_config=lora(lora_bias=True))


def test_unknown_method_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'light_peft'"):
        joint_trainer(tmp_path, prune=prune_config(ranks="light_pet"))


def test_search_that_was_run_without_the_method_is_not_gone_on_with(tmp_path: Path) -> None:
    joint_trainer(tmp_path, args={"max_steps": 3, "save_steps": 1}).train()
    trainer = joint_trainer(tmp_path, prune=prune_config(ranks="apt"), args={"max_steps": 3})
    with pytest.raises(DataError, match=r"lora\.ranks"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
