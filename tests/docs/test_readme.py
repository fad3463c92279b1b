"""What the README tells people to type works: its configuration, its commands, its Python example."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prunetune.cli.main import app
from tests.support import tiny_folder, tiny_rows, write_rows

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
MODEL = "Qwen/Qwen3-0.6B"
# On the tiny model instead of the README's: smaller numbers, the same settings.
SMALL = ["target.align=8", "train.max_steps=4", "train.batch_size=2", "train.max_length=32", "evaluate.speed=false"]


def commands() -> list[str]:
    text = "".join(body for language, body in BLOCKS if language == "")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("prunetune ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README assumes it: my_run.yaml, train.jsonl, test.jsonl, and a model under the README's name."""
    folder = tmp_path_factory.mktemp("readme")
    tiny_folder(folder / MODEL, "qwen3")
    write_rows(folder / "train.jsonl", tiny_rows(60))
    write_rows(folder / "test.jsonl", tiny_rows(10, seed=1))
    [yaml] = [body for language, body in BLOCKS if language == "yaml"]
    (folder / "my_run.yaml").write_text(yaml)
    recipes = "compare:\n  kept: [60%]\n  recipes: [base, {joint: random}, {one_shot: magnitude}]\n"
    (folder / "compare.yaml").write_text(yaml.replace("runs/my_run", "runs/compared") + recipes)
    for name in ("adapter", "a", "b", "c"):
        base = AutoModelForCausalLM.from_pretrained(folder / MODEL)
        tuned = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.mul_(1e-3)  # changes as small as tuning's: large ones are not dropped by lot
        tuned.save_pretrained(folder / name)
    return folder


def test_readme_shows_every_command() -> None:
    assert {command.split()[1] for command in commands()} == {
        "plan",
        "train",
        "export",
        "eval",
        "chat",
        "list",
        "doctor",
        "data",
        "delta",
        "merge",
        "prune",
        "compare",
    }


@pytest.mark.timeout(1500)
def test_readme_commands_run_in_order(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command in commands():
        words = shlex.split(command)[1:]
        if words[0] in ("plan", "train", "compare"):
            words += SMALL if "max_steps" not in command else [s for s in SMALL if "max_steps" not in s]
            words = [re.sub(r"max_steps=\d+", "max_steps=4", word) for word in words]
        if "--resume" in words:
            # The same settings as the run that it goes on with.
            words += ["target.kept=70%"]
        if words[0] == "prune":
            words += ["--align", "8"]
        if words[0] == "eval":
            words += ["--no-speed"]
        if "--id" in words:
            words[-1] = pq.read_table(workplace / "kept/audit.parquet")["id"][0].as_py()[:8]
        done = subprocess.run(
            [sys.executable, "-m", "prunetune.cli.main", *words],
            input="/quit\n",
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (workplace / "runs/my_run/compact/config.json").exists()
    assert (workplace / "runs/compared/report.html").exists()
    for name in ("smaller", "one", "three", "fitted", "pruned"):
        assert (workplace / name / "config.json").exists()
    assert (workplace / "kept/report.html").exists()


def test_readme_files_exist() -> None:
    for path in re.findall(r"(?:scripts|configs)/[\w./]+\.(?:sh|py|yaml|md)", README):
        assert (ROOT / path).exists(), path


def test_command_line_is_the_one_installed() -> None:
    assert app.info.name == "prunetune"
