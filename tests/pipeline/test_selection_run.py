"""`prunetune train` that chooses rows and tokens: end to end, resumed, and said in what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from prunetune.cli.main import app
from prunetune.pipeline.folder import read_config, resolved_text
from prunetune.pipeline.run import SELECTION, run
from tests.pipeline.test_run import STEPS, configure
from tests.support import logits
from tests.train.joint_runs import metrics, timeless
from tests.train.selecting_runs import decisions

DATA = {
    "samples": {"method": "q_tuning", "kept": "50%"},
    "tokens": {"method": "neighbour_perplexity", "kept": "70%"},
    "online": {"rescore_after": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with model and data."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("selection")


def test_command_line_run_chooses_and_leaves_its_decisions(root: Path) -> None:
    file = root / "run.yaml"
    file.write_text(resolved_text(configure(root, "cli", evaluate={"compare": "dense"})))
    overrides = ["data.samples.method=q_tuning", "data.samples.kept=25%"]
    overrides += ["data.tokens.method=neighbour_perplexity", "data.tokens.kept=70%"]
    result = CliRunner().invoke(app, ["train", str(file), *overrides])
    assert result.exit_code == 0, result.output
    lines = decisions(root / "cli")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["rows"] == [1, 4] for line in lines)
    select = read_config(root / "cli").selection()
    assert select is not None
    assert select.tokens.kept == 0.7
    entries = [entry for entry in metrics(root / "cli") if "loss" in entry]
    assert all(entry["rows_kept"] == 0.25 for entry in entries)
    # The dense run of the comparison sees all the data.
    dense = [entry for entry in metrics(root / "cli" / "dense" / "train") if "loss" in entry]
    assert len(dense) == STEPS
    assert not any("rows_kept" in entry for entry in dense)
    card = (root / "cli" / "README.md").read_text()
    assert "2509.23873" in card
    assert "25.0% of the rows" in card
    assert "selection.jsonl" in card
    assert len(lines) == len((root / "cli" / SELECTION).read_text().splitlines())


def test_interrupted_run_goes_on_with_the_same_choices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunetune.train.trainer import JointTrainer

    whole = run(configure(root, "whole", data=DATA))
    config = configure(root, "stopped", data=DATA)
    with monkeypatch.context() as patch:
        original = JointTrainer.training_step

        def training_step(self: JointTrainer, *args: object, **kwargs: object) -> object:
            self._interruption.requested |= self.state.global_step == 1
            return original(self, *args, **kwargs)

        patch.setattr(JointTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 2"):
            run(config)
    again = run(config, resume=True)
    assert decisions(again.folder) == decisions(whole.folder)
    assert timeless(metrics(again.folder)) == timeless(metrics(whole.folder))
    models = [AutoModelForCausalLM.from_pretrained(report.folder / "compact") for report in (again, whole)]
    assert torch.equal(logits(models[0]), logits(models[1]))
