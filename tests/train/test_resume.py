"""A run that was stopped and goes on is the run that was never stopped, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.core.errors import DataError, PlanMismatchError
from prunetune.model.plan import Plan
from prunetune.train.checkpoint import MARKER, newest, read_marker, write_marker
from prunetune.train.trainer import JointTrainer
from tests.support import tiny_rows
from tests.train.joint_runs import (
    FREEZE_STEP,
    STEPS,
    checkpoints,
    joint_trainer,
    metrics,
    prune_config,
    require_same,
    rows,
    timeless,
    weights,
)

Run = tuple[Path, dict[str, torch.Tensor], dict[str, Any]]

# (mask, compensation, units): every mask, both compensations, all kinds of units.
KINDS = {
    "saliency": ("saliency", {"method": "refit", "tokens": 256}, ("mlp_channels", "kv_groups")),
    "hard_concrete": ("hard_concrete", "none", ("mlp_channels", "kv_groups", "query_heads", "layers")),
}


def settings(kind: str) -> dict[str, Any]:
    """What the trainer of such a run is made with."""
    mask, compensation, units = KINDS[kind]
    return {
        "prune": prune_config(mask, compensation, units),
        "eval_dataset": rows(6, seed=9),
        "evaluate_at_freeze": True,
        # The 12 rows are 3 batches: epochs end at steps 3 and 6, before and after the freeze and its checkpoint.
        "train_dataset": rows(12),
        "args": {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 3},
    }


@pytest.fixture(scope="module", params=list(KINDS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run that kept all its checkpoints; its folder, weights and settings."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    trainer = joint_trainer(folder, **settings(request.param))
    trainer.train()
    assert checkpoints(folder) == list(range(1, STEPS + 1))
    return folder, weights(trainer), settings(request.param)


def stopped_after(folder: Path, step: int, copy: Path, *, frozen: bool = False) -> Path:
    """The folder as it was when ``step`` steps were done; ``frozen``: and the freeze too."""
    shutil.copytree(folder, copy)
    for later in checkpoints(copy):
        if later > step:
            shutil.rmtree(copy / f"checkpoint-{later}")
    if step < FREEZE_STEP or (step == FREEZE_STEP and not frozen):
        shutil.rmtree(copy / "freeze")
    return copy


def require_same_run(trainer: JointTrainer, run: Run) -> None:
    """Weights and metrics file as in the uninterrupted run."""
    folder, wanted, _ = run
    require_same(weights(trainer), wanted)
    assert timeless(metrics(Path(trainer.args.output_dir))) == timeless(metrics(folder))


@pytest.mark.parametrize(("step", "frozen"), [(1, False), (3, False), (4, False), (4, True), (5, True), (7, True)])
def test_resumed_run_equals_uninterrupted_run(run: Run, tmp_path: Path, step: int, frozen: bool) -> None:
    folder = stopped_after(run[0], step, tmp_path / "copy", frozen=frozen)
    resumed = joint_trainer(folder, **run[2])
    resumed.train(resume_from_checkpoint=True)
    require_same_run(resumed, run)
    assert resumed.state.global_step == STEPS


def test_metrics_of_the_freeze_are_logged_once_and_at_its_step(run: Run) -> None:
    entries = metrics(run[0])
    for key in ("eval_before_cut_loss", "eval_after_cut_loss"):
        assert [entry["step"] for entry in entries if key in entry] == [FREEZE_STEP]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, STEPS + 1))
    assert [entry["phase"] for entry in entries if "loss" in entry] == ["warmup"] + 3 * ["search"] + 4 * ["recover"]


def test_finished_run_is_not_trained_again(run: Run, tmp_path: Path) -> None:
    folder = stopped_after(run[0], STEPS, tmp_path / "copy")
    resumed = joint_trainer(folder, **run[2])
    result = resumed.train(resume_from_checkpoint=True)
    require_same_run(resumed, run)
    assert result.global_step == resumed.state.global_step == STEPS
    assert checkpoints(folder)[-1] == STEPS


def test_truncated_files_are_passed_over(run: Run, tmp_path: Path) -> None:
    folder = stopped_after(run[0], 7, tmp_path / "copy", frozen=True)
    for step, file in ((7, "optimizer.safetensors"), (6, "adapter_model.safetensors"), (5, "rng_state.pth")):
        path = folder / f"checkpoint-{step}" / file
        path.write_bytes(path.read_bytes()[:-1])
    assert newest(folder, folder / "freeze") == folder / "freeze" / "checkpoint"
    scores = folder / "freeze" / "checkpoint" / "optimizer.safetensors"
    scores.unlink()
    assert newest(folder, folder / "freeze") == folder / "checkpoint-4"
    (folder / "checkpoint-4" / MARKER).unlink()
    (folder / "checkpoint-3" / MARKER).write_text('{"files": ')
    assert newest(folder, folder / "freeze") == folder / "checkpoint-2"
    resumed = joint_trainer(folder, **run[2])
    resumed.train(resume_from_checkpoint=True)
    require_same_run(resumed, run)


def test_torn_checkpoint_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    folder = stopped_after(run[0], 3, tmp_path / "copy")
    (folder / "checkpoint-3" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"checkpoint-3 is not a complete checkpoint.*resume_from_checkpoint=True"):
        joint_trainer(folder, **run[2]).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no complete checkpoint"):
        joint_trainer(tmp_path / "new").train(resume_from_checkpoint=True)


def test_going_back_before_the_freeze_ignores_what_came_later(run: Run, tmp_path: Path) -> None:
    """The later checkpoints are left lying there, as they are when somebody goes back on purpose."""
    shutil.copytree(run[0], tmp_path / "copy")
    trainer = joint_trainer(tmp_path / "copy", **run[2])
    trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-2"))
    require_same_run(trainer, run)


def test_fresh_run_in_a_used_folder_ignores_what_lies_there(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run[0], tmp_path / "copy")
    trainer = joint_trainer(tmp_path / "copy", **run[2])
    trainer.train()
    require_same_run(trainer, run)


def test_checkpoint_of_another_plan_is_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run[0], tmp_path / "copy")
    plan = json.loads((tmp_path / "copy" / "freeze" / "plan.json").read_text())
    site, kept = next((site, kept) for site, kept in plan["kept"].items() if "mlp" in site)
    missing = next(i for i in range(64) if i not in kept)
    plan["kept"][site] = sorted([*kept[1:], missing])
    freeze = tmp_path / "copy" / "freeze"
    (freeze / "plan.json").write_text(json.dumps(plan))
    # As a whole freeze of another run would be; a damaged one is found by its digests, and done again.
    write_marker(freeze, {"plan": Plan.load(freeze / "plan.json").digest()})
    with pytest.raises(PlanMismatchError, match="follows another plan"):
        joint_trainer(tmp_path / "copy", **run[2]).train(resume_from_checkpoint=True)


def test_missing_freeze_folder_is_named(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "freeze")
    with pytest.raises(PlanMismatchError, match=r"freeze is missing"):
        joint_trainer(tmp_path / "copy", **run[2]).train(resume_from_checkpoint=True)


def test_sliced_trainer_does_not_go_back_before_the_freeze(tmp_path: Path) -> None:
    trainer = joint_trainer(tmp_path / "run")
    trainer.train()
    with pytest.raises(PlanMismatchError, match="sliced already"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_more_steps_can_be_asked_for_of_a_finished_run(tmp_path: Path) -> None:
    joint_trainer(tmp_path / "run").train()
    longer = joint_trainer(tmp_path / "run", args={"max_steps": STEPS + 3})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == STEPS + 3
    assert [e["step"] for e in metrics(tmp_path / "run") if "loss" in e] == list(range(1, STEPS + 4))


def test_one_kept_checkpoint_is_always_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a checkpoint is written and rotated, one that is whole stays."""
    from prunetune.train import trainer as module

    seen = []
    original = module.save_mask

    def save_mask(folder: Path, state: Any) -> None:
        # The new checkpoint has everything but its mask and marker: the former one must still be there.
        whole = [path.name for path in Path(folder).parent.glob("checkpoint-*") if read_marker(path)]
        seen.append(whole)
        original(folder, state)

    monkeypatch.setattr(module, "save_mask", save_mask)
    trainer = joint_trainer(tmp_path / "run", args={"save_total_limit": 1, "save_steps": 1})
    trainer.train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert checkpoints(tmp_path / "run") == [STEPS]
    assert newest(tmp_path / "run", tmp_path / "run" / "freeze") == tmp_path / "run" / f"checkpoint-{STEPS}"


def test_checkpoint_written_over_is_not_whole_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joint_trainer(tmp_path / "run", args={"max_steps": 2}).train()
    assert read_marker(tmp_path / "run" / "checkpoint-2")
    seen = []
    original = JointTrainer._save_optimizer_and_scheduler

    def save(self: JointTrainer, output_dir: str) -> None:
        seen.append(read_marker(Path(output_dir)))
        original(self, output_dir)

    monkeypatch.setattr(JointTrainer, "_save_optimizer_and_scheduler", save)
    joint_trainer(tmp_path / "run", args={"max_steps": 2}).train()
    assert seen
    assert not any(seen)


def test_checkpoint_of_plain_trl_can_be_resumed_without_prune(tmp_path: Path) -> None:
    from trl import SFTTrainer

    from tests.support import tiny_model, tiny_tokenizer
    from tests.train.joint_runs import lora, sft_args

    def plain() -> SFTTrainer:
        return SFTTrainer(
            model=tiny_model(),
            args=sft_args(tmp_path / "run"),
            train_dataset=rows(),
            processing_class=tiny_tokenizer(),
            peft_config=lora(),
        )

    whole = plain()
    whole.train()
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    resumed = joint_trainer(tmp_path / "run", prune=None)
    resumed.train(resume_from_checkpoint=True)
    require_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_rare_logs_and_other_save_strategies_resume_too(tmp_path: Path, strategy: str) -> None:
    args = {"save_strategy": strategy, "logging_steps": 5}
    whole = joint_trainer(tmp_path / "run", args=args, train_dataset=rows(12))
    whole.train()
    assert checkpoints(tmp_path / "run") == ([3, 4, 6, 8] if strategy == "epoch" else [4])
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}", ignore_errors=True)
    before = metrics(tmp_path / "run")
    if strategy == "epoch":
        shutil.rmtree(tmp_path / "run" / "freeze")
        shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = joint_trainer(tmp_path / "run", args=args, train_dataset=rows(12))
    resumed.train(resume_from_checkpoint=True)
    require_same(weights(resumed), weights(whole))
    assert timeless(metrics(tmp_path / "run")) == timeless(before)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_runs_freeze_and_announce_their_end(tmp_path: Path, steps: int) -> None:
    trainer = joint_trainer(tmp_path / "run", args={"max_steps": steps, "save_steps": 1})
    result = trainer.train()
    assert trainer.plan is not None
    assert trainer.model.config.intermediate_size < 64
    assert result.global_step == steps
    assert result.metrics["train_loss"] == pytest.approx(
        sum(e["loss"] for e in metrics(tmp_path / "run") if "loss" in e) / steps, rel=1e-5
    )
    assert sum("train_runtime" in e for e in metrics(tmp_path / "run")) == 1


def test_rows_are_what_the_comparison_needs() -> None:
    assert len({row["prompt"] for row in tiny_rows(12)}) == 12
