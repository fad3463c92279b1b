"""Nothing that a file brings along is run: no pickle, no code beside a model, no archive, no unsafe YAML."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

import prunetune
from prunetune.core.errors import UnsupportedModelError
from prunetune.model.resolve import resolve_model
from prunetune.train.checkpoint import read_marker, write_marker
from tests.faults.harness import Whole, Zygote
from tests.support import tiny_folder

SOURCES = sorted(Path(prunetune.__file__).parent.rglob("*.py"))
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "zipfile", "tarfile"}
# What opens models and tokenizers, and must say that code beside them is not run (STOCK says so, too).
OPENERS = {"AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Dotted name and node of every call."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_unpickles_unpacks_or_runs_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & FORBIDDEN_IMPORTS
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN_IMPORTS
    for name, call in calls(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert given.get("weights_only") == "True", ast.unparse(call)
        if name in (
            "yaml.load",
            "yaml.unsafe_load",
            "yaml.full_load",
            "np.load",
            "shutil.unpack_archive",
            "eval",
            "exec",
        ):
            pytest.fail(ast.unparse(call))
        if name.partition(".")[0] in OPENERS and name.endswith(".from_pretrained"):
            assert given.get("trust_remote_code") == "False" or "STOCK" in given.get(None, ""), ast.unparse(call)


def test_model_that_needs_code_of_its_own_is_refused_and_its_code_not_run(tmp_path: Path) -> None:
    folder, ran = tiny_folder(tmp_path / "model"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(UnsupportedModelError, match="code of its own"):
        resolve_model(str(folder))
    assert not ran.exists()


class Attack:
    """Runs a command when it is unpickled by anything that is not careful."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> object:
        return os.system, (f"touch {self._path}",)


@pytest.mark.slow
def test_pickles_in_a_checkpoint_are_not_run(
    server: Zygote, root: Path, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    shutil.copytree(root / "whole" / "kept", tmp_path / "run")
    checkpoint, ran = tmp_path / "run" / "train" / "checkpoint-4", tmp_path / "ran"
    shutil.rmtree(tmp_path / "run" / "train" / "checkpoint-6")
    facts = read_marker(checkpoint)
    assert facts is not None
    for name in ("rng_state.pth", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (checkpoint / name).write_bytes(pickle.dumps(Attack(ran)))
    write_marker(checkpoint, facts)
    server.serve("kept", root, tmp_path / "run")
    assert not ran.exists()
    assert "going on from step 4" in (tmp_path / "run.log").read_text()
