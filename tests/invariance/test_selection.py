"""Choosing rows and tokens: nothing chosen is plain TRL to the bit, and how a step is batched decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from prunetune.config.schema import SelectionConfig
from prunetune.train.trainer import JointTrainer
from tests.support import tiny_model, tiny_tokenizer
from tests.train.joint_runs import joint_trainer, lora, require_same, rows, sft_args, weights
from tests.train.selecting_runs import decisions, kept_ids, losses, plain_trainer, select

BOTH = {
    "samples": {"method": "q_tuning", "kept": "50%"},
    "tokens": {"method": "neighbour_perplexity", "kept": "60%"},
}


@pytest.mark.parametrize(
    "nothing",
    [
        select(),
        select("loss", "loss"),
        select("q_tuning", "neighbour_perplexity"),
        # All of the eight steps, once they are rounded.
        select({"method": "loss", "kept": "25%"}, {"method": "loss", "kept": "50%"}, warmup=0.95),
        select({"method": "random", "kept": "50%"}, warmup=0.5, anneal=0.45),
    ],
    ids=["none", "loss 100%", "q_tuning 100%", "warm-up", "warm-up and annealing"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_chosen_is_plain_trl_to_the_bit(tmp_path: Path, nothing: SelectionConfig, accumulate: int) -> None:
    args = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    plain = SFTTrainer(
        model=tiny_model(),
        args=sft_args(tmp_path / "plain", **args),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    plain.train()
    ours = joint_trainer(tmp_path / "ours", prune=None, select=nothing, args=args)
    ours.train()
    require_same(weights(ours), weights(plain))
    for key in ("loss", "grad_norm", "num_tokens"):
        found, wanted = ([e.get(key) for e in t.state.log_history if "loss" in e] for t in (ours, plain))
        assert found == wanted


def test_masks_with_everything_kept_are_the_joint_run_to_the_bit(tmp_path: Path) -> None:
    joint = joint_trainer(tmp_path / "joint")
    joint.train()
    ours = joint_trainer(tmp_path / "ours", select=select("q_tuning", "loss"))
    ours.train()
    require_same(weights(ours), weights(joint))
    assert ours.plan == joint.plan


def run(out: Path, batch: int, accumulate: int, **kwargs: Any) -> JointTrainer:
    """Eight rows a step, half of them and about 60% of their targets kept, in another way of batching."""
    args = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 4}
    args |= kwargs.pop("args", {})
    trainer = plain_trainer(out, select(**BOTH), train_dataset=rows(32), args=args, **kwargs)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> JointTrainer:
    """One micro-batch of eight."""
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("eight"), 8, 1)


def require_same_run(found: JointTrainer, wanted: JointTrainer) -> None:
    """Same decisions, and weights and losses equal but for float32 rounding."""
    here, there = Path(found.args.output_dir), Path(wanted.args.output_dir)
    assert kept_ids(here) == kept_ids(there)
    for ours, theirs in zip(decisions(here), decisions(there), strict=True):
        assert ours["target_tokens"] == theirs["target_tokens"]
        assert ours["rows"] == [4, 8]
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    theirs = weights(wanted)
    for name, weight in weights(found).items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_with_uneven_kept_tokens(eight: JointTrainer, tmp_path: Path, batch: int, accumulate: int) -> None:
    found = run(tmp_path / "run", batch, accumulate)
    assert len({tuple(line["target_tokens"]) for line in decisions(tmp_path / "run")}) > 1, "uneven from step to step"
    require_same_run(found, eight)


@pytest.mark.parametrize("args", [{"pad_to_multiple_of": 32}, {"padding_free": True, "max_length": None}])
def test_padding_decides_nothing(eight: JointTrainer, tmp_path: Path, args: dict[str, Any]) -> None:
    require_same_run(run(tmp_path / "run", 4, 2, args=args), eight)


class PadLeft(DataCollatorForLanguageModeling):
    """Pads on the left, as a user's own collator may."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(example["input_ids"]) for example in examples)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for example in examples:
            gap = width - len(example["input_ids"])
            columns["input_ids"].append([self.pad_token_id] * gap + example["input_ids"])
            columns["labels"].append([-100] * gap + example["labels"])
            columns["attention_mask"].append([0] * gap + [1] * (width - gap))
        return {name: torch.tensor(values) for name, values in columns.items()}


def test_padding_side_decides_nothing(eight: JointTrainer, tmp_path: Path) -> None:
    found = run(tmp_path / "run", 8, 1, data_collator=PadLeft(pad_token_id=0))
    assert kept_ids(tmp_path / "run") == kept_ids(Path(eight.args.output_dir))
    assert losses(found) == pytest.approx(losses(eight), rel=1e-4)


def test_order_of_a_steps_rows_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has all eight rows, in another order each time."""
    orders: list[list[list[str]]] = []
    for seed in (1, 2):
        args = {"per_device_train_batch_size": 8, "max_steps": 3, "seed": seed, "data_seed": seed, "learning_rate": 0.0}
        out = tmp_path / str(seed)
        plain_trainer(out, select(**BOTH), train_dataset=rows(8), args=args).train()
        orders.append(kept_ids(out))
    assert orders[0] == orders[1]
    assert orders[0][0] == orders[0][1] == orders[0][2], "a model that does not move chooses the same"
