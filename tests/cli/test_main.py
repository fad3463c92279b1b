"""The command line as a person meets it: instant help, messages without tracebacks, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunetune.cli.main import app
from prunetune.core.errors import DataError

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "sklearn", "datasketch")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with nothing but its config.json."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def run_file(tmp_path: Path, base: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {base}\ntarget: {{kept: 60%, align: 8}}\nfolder: {tmp_path}/run\n")
    return path


def invoke(*arguments: object, width: int = 80):
    from prunetune.core.console import console

    console.cache_clear()
    try:
        return CliRunner(env={"COLUMNS": str(width)}).invoke(app, [str(argument) for argument in arguments])
    finally:
        console.cache_clear()


def in_fresh_process(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout


@pytest.mark.parametrize(
    "command",
    [
        "import prunetune.cli.main",
        "import prunetune",
        "from prunetune.cli.main import app; app(['--help'], standalone_mode=False)",
        "from prunetune.cli.main import app; app(['train', '--help'], standalone_mode=False)",
        "from prunetune.cli.main import app; app(['list', 'units'], standalone_mode=False)",
        "from prunetune.cli.main import app; app(['list', 'families'], standalone_mode=False)",
        "from prunetune.cli.main import app; app(['list', 'samples'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported(command: str) -> None:
    out = in_fresh_process(f"import sys\n{command}\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert out.splitlines()[-1] == "[]"


def test_plan_needs_no_torch_and_no_weights(run_file: Path) -> None:
    code = (
        "import sys\nfrom prunetune.cli.main import app\n"
        f"app(['plan', {str(run_file)!r}, 'mask=hard_concrete'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert in_fresh_process(code).splitlines()[-1] == "[]"


def test_help_takes_little_more_than_the_libraries_that_draw_it() -> None:
    codes = {
        "ours": "from prunetune.cli.main import app; app(['--help'], standalone_mode=False)",
        "bare": "import typer, rich.console, pydantic, yaml",
    }
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(3):  # the best of three, in turns: the machine may be busy
        for name, code in codes.items():
            start = time.perf_counter()
            in_fresh_process(code)
            seconds[name].append(time.perf_counter() - start)
    assert min(seconds["ours"]) < 4 * min(seconds["bare"])


def test_help_lists_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("plan", "train", "export", "eval", "chat", "list", "doctor"):
        assert f" {command} " in result.output
        assert invoke(command, "--help").exit_code == 0


def test_version() -> None:
    from prunetune import __version__

    assert invoke("--version").output.strip() == f"prunetune {__version__}"


def test_configuration_errors_exit_with_2_and_no_traceback(run_file: Path) -> None:
    result = invoke("plan", run_file, "train.batch_sise=4", "target.kept=0")
    assert result.exit_code == 2
    assert "error: 2 problems in the configuration" in result.output
    assert "did you mean train.batch_size?" in result.output
    assert "Traceback" not in result.output


def test_unknown_methods_and_options_are_configuration_errors(run_file: Path) -> None:
    result = invoke("plan", run_file, "mask.method=salience", "compensation=refti")
    assert result.exit_code == 2
    assert "override: mask.method=salience: there is no mask 'salience'; did you mean 'saliency'?" in result.output
    assert "did you mean 'refit'?" in result.output
    result = invoke("plan", run_file, "mask.decai=0.9")
    assert result.exit_code == 2
    assert "did you mean 'decay'?" in result.output


def test_other_deliberate_errors_exit_with_1(run_file: Path) -> None:
    result = invoke("plan", run_file, "target=1%")
    assert result.exit_code == 1
    assert "cannot be met" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [(DataError("no [bold] rows"), 1, "error: no [bold] rows"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_what_a_run_raises_becomes_an_exit_code(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    import prunetune.pipeline.run as pipeline

    def run(config: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr(pipeline, "run", run)
    result = invoke("train", run_file)
    assert (result.exit_code, said in result.output) == (code, True)


def test_a_bug_keeps_its_traceback(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prunetune.pipeline.run as pipeline

    monkeypatch.setattr(pipeline, "run", lambda config, **options: 1 / 0)
    assert isinstance(invoke("train", run_file).exception, ZeroDivisionError)


def test_train_hands_settings_and_flags_on(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prunetune.pipeline.run as pipeline

    seen = []
    monkeypatch.setattr(pipeline, "run", lambda config, **options: seen.append((config, options)))
    assert invoke("train", run_file, "target.kept=70%", "train.max_steps=80", "--resume").exit_code == 0
    [(config, options)] = seen
    assert (config.target.kept, config.train.max_steps) == (0.7, 80)
    assert options == {"resume": True, "overwrite": False}
    assert invoke("train", run_file, "--resume", "--overwrite").exit_code == 2


def test_export_hands_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prunetune.pipeline.export_run as pipeline

    seen = []
    monkeypatch.setattr(pipeline, "export_run", lambda *places, **options: seen.append((places, options)))
    arguments = ["export", tmp_path, "--out", tmp_path / "out", "--target", "80%", "--dtype", "float32"]
    assert invoke(*arguments).exit_code == 0
    options = {"target": "80%", "dtype": "float32", "base": None, "replace": False}
    assert seen == [((tmp_path, tmp_path / "out"), options)]


def test_export_refuses_before_loading_anything(tmp_path: Path) -> None:
    result = invoke("export", tmp_path, "--out", tmp_path, "--target", "180", width=200)
    assert result.exit_code == 2
    assert "add --overwrite to replace it" in result.output
    assert "--target: '180' is not a fraction" in result.output
    assert "at most 100%" in invoke("export", tmp_path, "--out", tmp_path / "new", "--target", "180%").output


def test_eval_compares_the_base_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import prunetune.pipeline.compare_models as pipeline
    from prunetune.core.records import EvalResult

    seen = []

    def compare_models(names: list[str], data: str, **options: object) -> list[EvalResult]:
        seen.append((names, data, options))
        return [EvalResult(name, Path(name), {"domain_ppl": 2.0}) for name in names]

    monkeypatch.setattr(pipeline, "compare_models", compare_models)
    result = invoke("eval", "small", "--data", "rows.jsonl", "--compare", "large", "--no-speed")
    assert result.exit_code == 0
    assert "small vs large" in " ".join(result.output.split())
    [(names, data, options)] = seen
    assert (names, data, options["speed"]) == (["large", "small"], "rows.jsonl", False)


@pytest.mark.parametrize("what", ["masks", "scores", "compensation", "families", "units", "samples", "tokens", "ranks"])
def test_list_shows_names_and_marks_the_default(what: str) -> None:
    result = invoke("list", what)
    assert result.exit_code == 0
    expected = {
        "masks": ("saliency", "hard_concrete", "static", "random", "(default)", "decay"),
        "scores": ("wanda", "(default)", "needs: activations, weights"),
        "compensation": ("none", "refit", "(default)", "ridge"),
        "families": ("llama", "qwen3", "gemma2"),
        "units": ("mlp_channels", "kv_groups", "query_heads", "layers", "yes"),
        "samples": ("random", "q_tuning", "near_duplicates", "(online)", "data.samples.KEY", "don_direction"),
        "tokens": ("random", "neighbour_perplexity", "(online)", "data.tokens.KEY", "neighbour_weight"),
        "ranks": ("keep", "(default)", "light_peft", "apt", "lora.ranks.KEY", "moved"),
    }[what]
    assert all(name in result.output for name in expected)
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_doctor_gives_a_verdict_on_every_line() -> None:
    result = invoke("doctor")
    lines = result.output.splitlines()
    assert all(line.startswith(("ok  ", "warn", "fail")) for line in lines)
    names = {line[5:].split()[0] for line in lines}
    assert {"python", "cores", "memory", "disk", "bfloat16", "matmul"} <= names
