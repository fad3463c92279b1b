"""A whole run on a tiny model and JSON lines: what it leaves behind, going on, exporting again, never overwriting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetune.config.schema import RunConfig
from prunetune.core.errors import BudgetError, ConfigError, DataError, ExportError
from prunetune.core.files import read_json
from prunetune.model.architecture import describe
from prunetune.model.budget import kept_fractions, plan_shape
from prunetune.model.plan import Plan
from prunetune.pipeline import run as pipeline
from prunetune.pipeline.export_run import export_run
from prunetune.pipeline.folder import PACKAGES, VERSIONS, read_config
from prunetune.pipeline.loading import load_trained
from prunetune.pipeline.run import RunReport, run
from prunetune.pipeline.score_run import score_run
from prunetune.train.callbacks import Interruption
from tests.support import batch, logits, tiny_arch, tiny_folder, tiny_rows, write_rows
from tests.train.joint_runs import metrics, timeless

STEPS = 6


def configure(root: Path, folder: str = "run", **changes: Any) -> RunConfig:
    """The configuration of a tiny run; the model and data are made on first use."""
    if not (root / "model").exists():
        tiny_folder(root / "model", tie_word_embeddings=True)
        write_rows(root / "rows.jsonl", tiny_rows(60))
        (root / "prose.txt").write_text(" ".join(f"w{i % 90}" for i in range(400)))
    values: dict[str, Any] = {
        "model": str(root / "model"),
        "data": {"train": str(root / "rows.jsonl"), "validation_rows": 6, "general_text": str(root / "prose.txt")},
        "target": {"kept": "60%", "align": 8},
        "compensation": {"method": "refit", "tokens": 256},
        "train": {"max_steps": STEPS, "batch_size": 4, "max_length": 32, "bf16": False, "save_every": 2},
        "lora": {"rank": 4},
        "evaluate": {"rows": 6, "general_tokens": 128, "speed": False},
        "export": {"dtype": "float32", "verify": False},
        "folder": root / folder,
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return RunConfig(**values)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with model and data that all runs here share."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def done(root: Path) -> RunReport:
    """One finished run, its export verified in a fresh process."""
    return run(configure(root, export={"verify": True}))


def test_run_folder_holds_everything(done: RunReport) -> None:
    folder = done.folder
    for name in ("resolved.yaml", "versions.json", "metrics.jsonl", "plan.json", "evaluation.json", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "report.html").exists()
    assert len(list((folder / "figures").glob("*.png"))) >= 2
    assert {"config.json", "model.safetensors", "tokenizer.json", "plan.json"} <= {
        path.name for path in (folder / "compact").iterdir()
    }
    assert (folder / "train" / "freeze" / "plan.json").exists()
    entries = metrics(folder)
    assert {entry["phase"] for entry in entries} == {"warmup", "search", "recover"}
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, STEPS + 1))
    assert all({"kept_fraction", "learning_rate", "grad_norm"} <= e.keys() for e in entries if "loss" in e)
    assert {"eval_before_cut_loss", "eval_after_cut_loss"} <= {key for entry in entries for key in entry}
    assert set(PACKAGES) <= read_json(folder / VERSIONS).keys()


def test_recorded_configuration_is_the_one_that_ran(done: RunReport, root: Path) -> None:
    assert read_config(done.folder) == configure(root, export={"verify": True})
    assert yaml.safe_load((done.folder / "resolved.yaml").read_text())["mask"]["method"] == "saliency"


def test_plan_is_inside_the_budget_and_the_export_has_its_shape(done: RunReport) -> None:
    arch = tiny_arch(tie_word_embeddings=True)
    plan = Plan.load(done.folder / "plan.json")
    assert plan == Plan.load(done.folder / "compact" / "plan.json") == Plan.load(done.folder / "train/freeze/plan.json")
    shape = plan_shape(arch, plan)
    assert 0.4 < kept_fractions(arch, shape)["decoder"] <= 0.6
    exported = AutoModelForCausalLM.from_pretrained(done.folder / "compact")
    found = describe(exported.config)
    assert (found.layers, found.kv_groups, found.mlp_channels) == (shape.layers, shape.kv_groups, shape.mlp_channels)


def test_export_is_the_trained_model_in_stock_transformers(done: RunReport, root: Path) -> None:
    from prunetune.model.resolve import resolve_model

    stock = AutoModelForCausalLM.from_pretrained(done.folder / "compact", dtype=torch.float32).eval()
    trained, plan = load_trained(done.folder, resolve_model(str(root / "model")), "float32")
    assert plan.digest() == Plan.load(done.folder / "plan.json").digest()
    assert (logits(stock) - logits(trained.eval())).abs().max() <= 1e-4
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "compact")
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    assert stock.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape[1] == ids.shape[1] + 4
    assert done.exported is not None
    assert done.exported.verification


def test_evaluation_compares_base_and_compact(done: RunReport) -> None:
    assert [result.label for result in done.results] == ["base", "compact"]
    base, compact = done.results
    assert compact.numbers["params_total"] < base.numbers["params_total"]
    saved = json.loads((done.folder / "evaluation.json").read_text())
    assert saved


def test_existing_run_is_not_overwritten_unless_asked(done: RunReport, root: Path) -> None:
    before = (done.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        run(configure(root, export={"verify": True}))
    with pytest.raises(ConfigError, match="seed"):
        run(configure(root, export={"verify": True}, seed=5), resume=True)
    assert (done.folder / "metrics.jsonl").read_bytes() == before
    (root / "other").mkdir()
    (root / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and not a run"):
        run(configure(root, "other"))
    with pytest.raises(ConfigError, match="not empty and not a run"):
        run(configure(root, "other"), overwrite=True)
    assert (root / "other" / "thesis.txt").read_text() == "mine"


def test_impossible_budget_is_refused_before_anything_is_written(root: Path) -> None:
    with pytest.raises(BudgetError):
        run(configure(root, "never", target={"kept": "1%"}))
    assert not (root / "never").exists()


def test_finished_run_is_evaluated_and_exported_again_but_not_trained(done: RunReport, root: Path) -> None:
    shutil.copytree(done.folder, root / "again")
    before = timeless(metrics(root / "again"))
    wanted = logits(AutoModelForCausalLM.from_pretrained(done.folder / "compact"))
    report = run(configure(root, "again"), resume=True)
    assert timeless(metrics(root / "again")) == before
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(report.folder / "compact")), wanted)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_interrupted_run_goes_on_and_ends_the_same(
    done: RunReport, root: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    from prunetune.train.trainer import JointTrainer

    config = configure(root, f"stopped-{step}")
    with monkeypatch.context() as patch:
        original = JointTrainer.begin_step

        def begin_step(self: JointTrainer, number: int) -> None:
            if number + 1 == step:
                self._interruption.requested = True
            original(self, number)

        patch.setattr(JointTrainer, "begin_step", begin_step)
        with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step} of {STEPS}"):
            run(config)
    assert not (config.folder / "compact").exists()
    if step < 3:
        with pytest.raises(DataError, match="before its plan was frozen"):
            export_run(config.folder, root / f"early-{step}")
    report = run(config, resume=True)
    assert timeless(metrics(report.folder)) == timeless(metrics(done.folder))
    found, wanted = (AutoModelForCausalLM.from_pretrained(r.folder / "compact") for r in (report, done))
    assert torch.equal(logits(found), logits(wanted))


def test_run_killed_before_its_first_whole_checkpoint_starts_anew(done: RunReport, root: Path) -> None:
    config = configure(root, "torn")
    shutil.copytree(done.folder, config.folder)
    for path in (config.folder / "train").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (config.folder / "train" / "checkpoint-2").mkdir()
    (config.folder / "train" / "checkpoint-2" / "optimizer.safetensors").write_bytes(b"half")
    report = run(config, resume=True)
    assert timeless(metrics(report.folder)) == timeless(metrics(done.folder))


def test_overwriting_starts_anew(root: Path) -> None:
    config = configure(root, "twice", evaluate={"enabled": False})
    run(config)
    first = timeless(metrics(config.folder))
    (config.folder / "left-over").touch()
    run(config, overwrite=True)
    assert timeless(metrics(config.folder)) == first
    assert not (config.folder / "left-over").exists()


def test_export_again_and_in_another_dtype(done: RunReport, root: Path) -> None:
    again = export_run(done.folder, root / "half", dtype="bfloat16").folder
    assert AutoModelForCausalLM.from_pretrained(again, dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ExportError, match="exists"):
        export_run(done.folder, again)
    same = export_run(done.folder, root / "same").folder
    wanted = logits(AutoModelForCausalLM.from_pretrained(done.folder / "compact"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(same)), wanted)


def test_retarget_cuts_the_model_of_the_freeze_to_another_budget(done: RunReport, root: Path) -> None:
    arch = tiny_arch(tie_word_embeddings=True)
    larger = export_run(done.folder, root / "larger", target="85%").folder
    plan = Plan.load(larger / "plan.json")
    assert 0.6 < kept_fractions(arch, plan_shape(arch, plan))["decoder"] <= 0.85
    assert AutoModelForCausalLM.from_pretrained(larger).config.intermediate_size > 16
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(larger), batch()), logits_of(done, batch()))
    with pytest.raises(BudgetError):
        export_run(done.folder, root / "nothing", target="1%")
    assert not (root / "nothing").exists()


def logits_of(done: RunReport, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a run's export."""
    return logits(AutoModelForCausalLM.from_pretrained(done.folder / "compact"), inputs)


def test_retarget_to_the_same_budget_cuts_the_same_units(done: RunReport, root: Path) -> None:
    again = export_run(done.folder, root / "sixty", target="60%").folder
    assert Plan.load(again / "plan.json").kept == Plan.load(done.folder / "plan.json").kept


def test_dense_comparison_trains_as_many_steps_and_is_a_third_column(root: Path) -> None:
    report = run(configure(root, "dense", evaluate={"compare": "dense"}))
    assert [result.label for result in report.results] == ["base", "dense LoRA", "compact"]
    logged = metrics(report.folder / "dense" / "train")
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, STEPS + 1))
    assert {entry["phase"] for entry in logged} == {"train"}
    base, dense, _ = report.results
    assert dense.numbers["params_total"] == base.numbers["params_total"]


def test_failing_export_leaves_the_trained_run_to_go_on_from(
    done: RunReport, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(root, "full", evaluate={"enabled": False})

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise ExportError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.PruneTuneTrainer, "export", full_disk)
        with pytest.raises(ExportError):
            run(config)
    assert not (config.folder / "compact").exists()
    report = run(config, resume=True)
    wanted = logits_of(done, batch())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(report.folder / "compact")), wanted)


def test_interruption_is_asked_for_once_per_training() -> None:
    interruption = Interruption()
    interruption.requested = True
    with interruption:
        assert not interruption.requested


def test_influence_of_rows_takes_adams_moments_from_a_checkpoint(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half_way = {"warmup": 0.1, "search": 0.4}
    checkpoints = run(configure(root, "less", phases=half_way, train={"keep_checkpoints": 3})).folder / "train"
    data = str(root / "rows.jsonl")
    asked: dict[str, Any] = {"extras": ("influence",), "validation": data, "max_rows": 8, "max_length": 32}
    shutil.copytree(checkpoints / "checkpoint-3", tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.safetensors").unlink()
    found = {}
    for folder, said in ((checkpoints / "checkpoint-3", "Adam would take"), (tmp_path / "adapter", "gradients:")):
        scores = score_run(data, str(folder), tmp_path / f"{folder.name}_scores", **asked)
        assert scores is not None
        found[said] = scores.table.rows["influence"]
        assert said in " ".join(capsys.readouterr().out.split())
    assert not np.allclose(*found.values(), atol=1e-3)
    with pytest.raises(DataError, match="does not fit"):
        score_run(data, str(checkpoints / f"checkpoint-{STEPS}"), tmp_path / "sliced", **asked)
