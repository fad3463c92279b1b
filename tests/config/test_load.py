"""A configuration is read whole: every fault is reported at once, with its place and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunetune.config.load import load_config
from prunetune.config.schema import RunConfig
from prunetune.core.errors import ConfigError, Problem

GOOD = "model: some-model\ntarget: 60%\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(path: Path | None, *overrides: str, checks: tuple = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, checks)
    return [str(problem) for problem in caught.value.problems]


def test_short_forms_and_sections_mean_the_same(tmp_path: Path) -> None:
    short = load_config(write(tmp_path, GOOD + "mask: random\n"))
    long = load_config(write(tmp_path, "model: {name: some-model}\ntarget: {kept: 0.6}\nmask: {method: random}\n"))
    assert short == long
    assert short.target.kept == 0.6


def test_overrides_win_over_the_file_and_keep_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: a, dtype: bfloat16}\ntarget: {kept: 50%, align: 32}\ntrain: {max_steps: 9}\n")
    config = load_config(path, ["target=60%", "model=b", "train.learning_rate=1e-3", "train.report_to=[]"])
    assert (config.target.kept, config.target.align) == (0.6, 32)
    assert (config.model.name, config.model.dtype) == ("b", "bfloat16")
    assert (config.train.max_steps, config.train.learning_rate) == (9, 1e-3)


@pytest.mark.parametrize(
    ("override", "params", "size"),
    [("target.params=90M", 90_000_000, None), ("target.size=180MB", None, 180_000_000)],
)
def test_an_overriding_budget_replaces_the_files_budget(
    tmp_path: Path, override: str, params: int | None, size: int | None
) -> None:
    target = load_config(write(tmp_path, GOOD), [override]).target
    assert (target.kept, target.params, target.size) == (None, params, size)


def test_two_overriding_budgets_are_refused(tmp_path: Path) -> None:
    [fault] = faults(write(tmp_path, GOOD), "target.kept=60%", "target.params=90M")
    assert "exactly one" in fault
    assert "kept, params" in fault


def test_another_method_does_not_inherit_the_files_options(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "mask: {method: saliency, decay: 0.9}\n")
    assert load_config(path, ["mask=random"]).mask.options() == {}
    assert load_config(path, ["mask.method=random", "mask.refresh=2"]).mask.options() == {"refresh": 2}
    assert load_config(path, ["mask.refresh=2"]).mask.options() == {"decay": 0.9, "refresh": 2}


def test_all_faults_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: some-model\n"
        "target:\n"
        "  kept: 60\n"
        "  units: [mlp_chanels]\n"
        "train:\n"
        "  batch_sise: 4\n"
        "  scheduler: cosin\n"
        "  sft: {weight_dcay: 0.1, max_steps: 3}\n"
        "data:\n"
        "  train: nowhere/rows.jsonl\n",
    )
    found = faults(path, "seed=-1", "phases.warmup=many")
    lines = {
        3: "60 is not a fraction; write 60%",
        4: "did you mean mlp_channels?",
        6: "did you mean train.batch_size?",
        7: "did you mean 'cosine'?",
        10: "nowhere/rows.jsonl does not exist",
    }
    for line, text in lines.items():
        assert any(fault.startswith(f"{path}:{line}: ") and text in fault for fault in found), text
    assert any(f"{path}:8" in fault and "did you mean weight_decay?" in fault for fault in found)
    assert any(f"{path}:8" in fault and "set by train.max_steps" in fault for fault in found)
    assert any(fault.startswith("override: seed=-1: -1 is too small; set at least 0") for fault in found)
    assert any(
        fault.startswith("override: phases.warmup=many: 'many' is not a fraction; write 60% or 0.6") for fault in found
    )
    assert len(found) == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: x\n", "unknown key; did you mean model?"),
        ("lora: {r: 8}\n", "did you mean lora.rank?"),
        ("data: {max_length: 8}\n", "did you mean train.max_length?"),
        ("train: {weight_decay: 0.1}\n", "set it as train.sft.weight_decay"),
        ("train: {num_train_epochs: 2}\n", "train.epochs sets it"),
        ("train: {report_to: wandb}\n", "'wandb' is not a list; write [wandb]"),
        ("train: {max_steps: 2.5}\n", "2.5 is not a whole number"),
        ("train: {bf16: maybe}\n", "'maybe' is not true or false"),
        ("train: 3\n", "3 is not a group of `key: value` lines"),
        ("target: 150%\n", "'150%' is too large; set at most 100%"),
        ("target: {kept: 0}\n", "0% would leave no decoder"),
        ("target: {}\n", "exactly one of target.kept, target.params, target.size; set now: none"),
    ],
)
def test_one_fault_says_what_to_write_instead(tmp_path: Path, text: str, said: str) -> None:
    base = "" if text.startswith("target") else "target: 60%\n"
    base += "" if text.startswith("modle") else "model: some-model\n"
    assert any(said in fault for fault in faults(write(tmp_path, base + text)))


def test_missing_settings_are_named_with_an_example() -> None:
    found = faults(None)
    assert any("model: is missing" in fault and "model: smollm2-135m" in fault for fault in found)
    assert any("target: is missing" in fault and "target: 60%" in fault for fault in found)


def test_empty_file_and_empty_sections_are_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "# nothing yet\n")
    assert load_config(path, ["model=a", "target=60%"]).data.train == "pydocs"
    path = write(tmp_path, GOOD + "train:\n  # max_steps: 3\nexport:\n")
    assert load_config(path).train.max_steps == -1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\n", "not valid YAML"),
        ("a:\n\t- b\n", "a tab is used for indentation"),
        ("a: b: c\n", "quote a value that holds a colon"),
        ("- a\n- b\n", "holds no settings"),
        ("just words\n", "holds no settings"),
        ("seed: 1\nseed: 2\n", "duplicate key"),
    ],
)
def test_files_that_are_not_settings(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    [fault] = faults(path)
    assert fault.startswith(str(path))
    assert said in fault


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    [fault] = faults(tmp_path / "rum.yaml")
    assert "no such file" in fault
    assert "run.yaml" in fault


def test_a_run_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text(GOOD)
    [fault] = faults(tmp_path)
    assert "did you mean" in fault
    assert "resolved.yaml" in fault


def test_interpolation_is_resolved_and_its_faults_are_placed(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "seed: 7\nfolder: runs/seed-${seed}\n")
    assert load_config(path).folder == Path("runs/seed-7")
    [fault] = faults(write(tmp_path, GOOD + "folder: runs/${nothing}\n"))
    assert ":3: folder" in fault


@pytest.mark.parametrize("override", ["words", "=3", "a..b=3", "train.sft=["])
def test_overrides_that_cannot_be_read(tmp_path: Path, override: str) -> None:
    [fault] = faults(write(tmp_path, GOOD), override)
    assert fault.startswith(f"override: {override}")


def test_further_checks_get_the_place_of_their_field(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "mask: nonsense\n")

    def check(config: RunConfig) -> list[Problem]:
        return [Problem(f"no {config.mask.method}", "mask.method")]

    assert faults(path, checks=(check,)) == [f"{path}:3: mask.method: no nonsense"]


def test_a_resolved_configuration_loads_to_itself(tmp_path: Path) -> None:
    import yaml

    config = load_config(write(tmp_path, GOOD + "mask: {method: saliency, decay: 0.9}\n"))
    dumped = config.model_dump(mode="json")
    assert load_config(write(tmp_path, yaml.safe_dump(dumped))) == config
