"""The freeze changes nothing but speed: against a model, an adapter and an optimizer cut by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTTrainer

from prunetune.model.gates import GateSet
from prunetune.model.plan import Plan
from prunetune.model.surgery import base_model
from prunetune.model.units import sites
from prunetune.train.trainer import JointTrainer
from tests.support import hard_gates, random_plan, tiny_arch, tiny_model, tiny_tokenizer
from tests.train.joint_runs import (
    FREEZE_STEP,
    PHASES,
    joint_trainer,
    lora,
    metrics,
    prune_config,
    require_same,
    rows,
    sft_args,
    weights,
)

ALL_UNITS = ("mlp_channels", "kv_groups", "query_heads", "layers")
HEAD = 8  # head_dim of the tiny llama: 48 hidden, 6 query heads in 3 KV groups


def static_run(out: Path, phases: Any = PHASES, **kwargs: Any) -> JointTrainer:
    """A run that follows a random plan; its gates are fully closed before the freeze."""
    plan_file = out.with_suffix(".plan.json")
    random_plan(tiny_arch(), ALL_UNITS, seed=3).save(plan_file)
    mask = {"method": "static", "plan": plan_file, "fade_share": 0.3}
    prune = prune_config(mask, units=ALL_UNITS, phases=phases)
    trainer = joint_trainer(out, prune=prune, **kwargs)
    trainer.train()
    assert trainer.plan == Plan.load(plan_file)
    return trainer


def test_slicing_leaves_the_evaluation_loss_alone(tmp_path: Path) -> None:
    static_run(tmp_path / "run", eval_dataset=rows(9, seed=5), evaluate_at_freeze=True)
    found = {key: entry[key] for entry in metrics(tmp_path / "run") for key in entry if key.endswith("cut_loss")}
    assert found["eval_after_cut_loss"] == pytest.approx(found["eval_before_cut_loss"], rel=1e-6)
    dense = joint_trainer(tmp_path / "dense", prune=None, eval_dataset=rows(9, seed=5)).evaluate()["eval_loss"]
    assert abs(dense - found["eval_before_cut_loss"]) > 1e-3, "closing gates did something"


class HandCut:
    """What stays of a tiny llama, written out without the family tables."""

    def __init__(self, plan: Plan):
        arch = tiny_arch()
        self.layers = plan.kept["layers"]
        self.features: dict[str, dict[int, tuple[list[int] | None, list[int] | None]]] = {}
        for layer in self.layers:
            heads = plan.kept_query_heads(arch, layer)
            q = [head * HEAD + i for head in heads for i in range(HEAD)]
            kv = [group * HEAD + i for group in plan.kept[f"layers.{layer}.kv_groups"] for i in range(HEAD)]
            mlp = list(plan.kept[f"layers.{layer}.mlp_channels"])
            for name, cut in {
                "q_proj": (q, None),
                "k_proj": (kv, None),
                "v_proj": (kv, None),
                "o_proj": (None, q),
                "gate_proj": (mlp, None),
                "up_proj": (mlp, None),
                "down_proj": (None, mlp),
            }.items():
                self.features.setdefault(name, {})[layer] = cut

    def __call__(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """A dense tensor's new name and content; None if its layer leaves."""
        parts = name.split(".")
        if "layers" not in parts:
            return name, tensor
        at = parts.index("layers") + 1
        layer = int(parts[at])
        if layer not in self.layers:
            return None
        parts[at] = str(self.layers.index(layer))
        linear = next((part for part in parts if part in self.features), None)
        if linear and tensor.dim():
            out, into = self.features[linear][layer]
            if out is not None and "lora_A" not in parts:
                tensor = tensor[out]
            if into is not None and "lora_B" not in parts:
                tensor = tensor[:, into]
        return ".".join(parts), tensor.clone().contiguous()

    def all(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of a dict of tensors."""
        return dict(found for name, tensor in tensors.items() if (found := self(name, tensor)))


def for_plain_trl(folder: Path, moments: dict[str, dict[str, Tensor]]) -> None:
    """Writes a checkpoint's optimizer and schedule as plain TRL reads them: by the parameters' numbers."""
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    [group] = facts["groups"]
    numbers = range(len(moments))
    # The optimizer's order: one group with decay, in the model's order, and an empty one without.
    groups = [{**group, "params": [*numbers]}, {**group, "params": []}]
    torch.save({"state": dict(zip(numbers, moments.values())), "param_groups": groups}, folder / "optimizer.pt")
    torch.save(facts["scheduler"], folder / "scheduler.pt")


def moments_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint keeps for every parameter, in the order of its groups."""
    flat = load_file(folder / "optimizer.safetensors")
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        [group] = json.loads(file.metadata()["groups"])
    return {
        name: {label.split(":")[0]: value for label, value in flat.items() if label.endswith(f":{name}")}
        for name in group["params"]
    }


def cut_checkpoint_by_hand(source: Path, target: Path, cut: HandCut) -> None:
    """The dense checkpoint's adapter and AdamW moments, cut without prunetune."""
    shutil.copytree(source, target)
    save_file(cut.all(load_file(source / "adapter_model.safetensors")), target / "adapter_model.safetensors")
    moments = {}
    for name, kept in moments_of(source).items():
        if found := cut(name, kept["exp_avg"]):
            moments[found[0]] = {key: cut(name, value)[1] for key, value in kept.items()}  # type: ignore[index]
    for_plain_trl(target, moments)


def small_model_by_hand(cut: HandCut) -> Any:
    """A stock llama of the plan's widths with the kept base weights, and fresh adapters on it."""
    small = tiny_model(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=40)
    small.load_state_dict(cut.all(dict(tiny_model().state_dict())))
    return get_peft_model(small, lora())


def test_recover_phase_equals_training_a_model_sliced_by_hand(tmp_path: Path) -> None:
    joint = static_run(tmp_path / "run")
    assert joint.plan is not None
    assert {len(joint.plan.kept[f"layers.{i}.kv_groups"]) for i in joint.plan.kept["layers"]} == {2}
    cut = HandCut(joint.plan)
    by_hand = tmp_path / "by_hand"
    cut_checkpoint_by_hand(tmp_path / "run" / f"checkpoint-{FREEZE_STEP}", by_hand, cut)
    plain = SFTTrainer(
        model=small_model_by_hand(cut),
        args=sft_args(tmp_path / "plain"),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
    )
    plain.train(resume_from_checkpoint=str(by_hand))
    assert plain.state.global_step == joint.state.global_step == 8
    require_same(weights(joint), weights(plain))


class HoldGates(TrainerCallback):
    """Keeps a dense model's gates closed as a plan says."""

    def __init__(self, model: Any, plan: Plan):
        arch = tiny_arch()
        self._sites = sites(arch, ALL_UNITS)
        self._gates = GateSet(base_model(model), self._sites)
        self._gates.attach()
        self._gates.set(hard_gates(arch, self._sites, plan))


def test_next_step_after_the_freeze_is_the_masked_dense_models_next_step(tmp_path: Path) -> None:
    steps = FREEZE_STEP + 1
    args = {"max_steps": steps, "save_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    peft = lora(lora_dropout=0.0)
    joint = static_run(tmp_path / "run", {"warmup": 0.2, "search": 0.6}, args=args, peft_config=peft)
    assert joint.plan is not None
    freeze = tmp_path / "run" / f"checkpoint-{FREEZE_STEP}"
    dense = PeftModel.from_pretrained(tiny_model(), freeze, is_trainable=True)
    plain = SFTTrainer(
        model=dense, args=sft_args(tmp_path / "dense", **args), train_dataset=rows(), processing_class=tiny_tokenizer()
    )
    HoldGates(dense, joint.plan)
    for_plain_trl(freeze, moments_of(freeze))
    plain.train(resume_from_checkpoint=str(freeze))
    wanted = HandCut(joint.plan).all(weights(plain))
    found, before = weights(joint), HandCut(joint.plan).all(load_file(freeze / "adapter_model.safetensors"))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-6, msg=name)
    moved = [n for n, v in before.items() if not torch.equal(v, found[n.replace(".weight", ".default.weight")])]
    assert len(moved) == len(before), "every adapter moved in that step"
