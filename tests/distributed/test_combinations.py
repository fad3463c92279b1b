"""What is combined with a run changes as little under any engine: the rows and tokens chosen, the losses, the plan.

ZeRO is DeepSpeed's own on CPUs, FSDP2 torch's through accelerate (fsdp_on_cpu.py); the reference is one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prunetune.config.engines import launch_settings
from tests.distributed.test_engines import GOT, Run, compile_communication, require_same_trajectory, start
from tests.distributed.test_two_processes import launch, saved
from tests.train.joint_runs import metrics, require_same
from tests.train.selecting_runs import decisions, kept_ids

pytestmark = pytest.mark.slow  # starting two processes of torch takes longer than what they do

ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {"engine": "zero2"},
    "zero3": {"engine": "zero3"},
    "fsdp2": {"engine": "ddp", "fsdp": True},
}
# Everything that reads or changes adapters beside the optimizer, and leaves a part of them for the export.
DELTA = {
    "method": "dare",
    "drop": "50%",
    "regularize": "l2",
    "strength": 0.1,
    "train_drop": "40%",
    "train_drop_unit": "entries",
}
SELECTIONS: dict[str, dict[str, Any]] = {
    # The second process has no row of its own in some steps.
    "few rows": {"samples": {"method": "donod", "kept": "25%"}, "accumulate": 2},
    "rows and tokens": {
        "samples": {"method": "q_tuning", "kept": "50%"},
        "tokens": {"method": "excess_loss", "kept": "70%"},
        "joint": True,
        "rescore_after": 2,
    },
    "infobatch": {"samples": "infobatch", "joint": True},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one process with four rows a step, made when first asked for."""
    made: dict[str, Run] = {}

    def run(name: str, **asked: Any) -> Run:
        if name not in made:
            out = tmp_path_factory.mktemp("alone")
            made[name] = out, start(out, rows=4, **asked)
        return made[name]

    return run


def require_got(found: list[dict[str, Any]], engine: str) -> None:
    """The processes ran under the engine that was asked for."""
    wanted = "FSDP" if ENGINES[engine].get("fsdp") else GOT[engine]
    assert [(process["engine"], process["processes"]) for process in found] == [(wanted, 2)] * 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_distillation_takes_the_same_steps(engine: str, checkpointing: bool, alone: Any, tmp_path: Path) -> None:
    args = {"activation_checkpointing": True} if checkpointing else {}
    found = start(tmp_path / "run", distill=0.5, args=args, **ENGINES[engine])
    require_got(found, engine)
    reference = alone("distill", distill=0.5)
    require_same_trajectory(found, tmp_path / "run", reference)
    taught = [entry["distill_kl"] for entry in metrics(tmp_path / "run") if "distill_kl" in entry]
    assert len(taught) == sum("distill_kl" in entry for entry in metrics(reference[0])) == 3
    assert taught[-1] > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_pulled_and_dropped_adapters_take_the_same_steps_and_leave_the_same_model(
    engine: str, alone: Any, tmp_path: Path
) -> None:
    asked = {"delta": DELTA, "export": True}
    found = start(tmp_path / "run", **asked, **ENGINES[engine])
    require_got(found, engine)
    reference = alone("delta", **asked)
    require_same_trajectory(found, tmp_path / "run", reference)
    sizes = [[e["delta_norm"] for e in metrics(out) if "delta_norm" in e] for out in (tmp_path / "run", reference[0])]
    assert len(sizes[0]) == 8
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)
    own, wanted = (load_file(out / "export" / "model.safetensors") for out in (tmp_path / "run", reference[0]))
    assert own.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(own[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_small_adapters_that_zero3_keeps_whole_are_pulled_too(alone: Any, tmp_path: Path) -> None:
    """As it is shipped, and not with everything spread, as in the other tests."""
    compile_communication()
    config = tmp_path / "zero3.yaml"
    config.write_text(yaml.safe_dump(launch_settings("zero3", 2, cpu=True)))
    asked = {"delta": DELTA, "export": True}
    found = launch(2, tmp_path / "run", config=config, **asked)
    require_got(found, "zero3")
    require_same_trajectory(found, tmp_path / "run", alone("delta", **asked))


@pytest.mark.parametrize(
    "mask", ["lora_gradient", "gradual_zero", "atp", "apt", "light_peft", "maskprune", "polarized"]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_mask_decides_the_same(engine: str, mask: str, alone: Any, tmp_path: Path) -> None:
    found = start(tmp_path / "run", mask=mask, **ENGINES[engine])
    require_got(found, engine)
    require_same_trajectory(found, tmp_path / "run", alone(mask, mask=mask))


@pytest.mark.parametrize("ranks", ["light_peft", "apt"])
@pytest.mark.parametrize("engine", ["ddp", *ENGINES])
def test_adapters_get_the_ranks_that_they_get_in_one_process(
    engine: str, ranks: str, alone: Any, tmp_path: Path
) -> None:
    found = start(tmp_path / "run", ranks=ranks, **ENGINES.get(engine, {"engine": engine}))
    reference = alone(f"ranks {ranks}", ranks=ranks)
    require_same_trajectory(found, tmp_path / "run", reference)
    sizes = {weight.shape[0] for name, weight in saved(reference[0]).items() if "lora_A" in name}
    assert len(sizes) > 1, "ranks differ"


@pytest.mark.parametrize("engine", ["ddp", *ENGINES])
def test_bfloat16_arithmetic_follows_one_process(engine: str, alone: Any, tmp_path: Path) -> None:
    asked = {"args": {"bf16": True}, "dtype": "bfloat16"}
    found = start(tmp_path / "run", **asked, **ENGINES.get(engine, {"engine": engine}))
    assert {process["processes"] for process in found} == {2}
    _, [reference] = alone("bf16", **asked)
    for process in found:
        assert process["step"] == reference["step"]
        assert process["plan"] == found[0]["plan"] is not None
        # bfloat16's own precision: that of rounding once.
        assert process["losses"] == pytest.approx(reference["losses"], rel=2**-8)
    require_same(saved(tmp_path / "run", 0), saved(tmp_path / "run", 1))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_rows_and_tokens_are_chosen(engine: str, selection: str, alone: Any, tmp_path: Path) -> None:
    asked = {"script": "tests.distributed.selection_script", **SELECTIONS[selection]}
    found = start(tmp_path / "run", **asked, **ENGINES[engine])
    require_got(found, engine)
    out, [reference] = alone(selection, **asked)
    assert kept_ids(tmp_path / "run") == kept_ids(out)
    assert len(decisions(tmp_path / "run")) == 8, "written once"
    for process in found:
        assert process["plan"] == reference["plan"]
        assert process["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    require_same(saved(tmp_path / "run", 0), saved(tmp_path / "run", 1))
    for name, weight in saved(out).items():
        torch.testing.assert_close(saved(tmp_path / "run")[name], weight, rtol=1e-3, atol=2e-5, msg=name)
