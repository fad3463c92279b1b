"""`prunetune plan`: the numbers are the budget module's, and they fit a narrow terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunetune.config.load import load_config
from prunetune.core.errors import ConfigError
from prunetune.pipeline.plan_run import count_rows, plan_run
from tests.cli.test_main import base, invoke, run_file

__all__ = ["base", "run_file"]  # fixtures


def test_plan_counts_what_the_shapes_say(run_file: Path) -> None:
    plan = plan_run(load_config(run_file, ["train.max_steps=80"]))
    # Per layer: q and o 64x64, k and v 64x32, three MLP matrices 64x192; embeddings 100x64 tied, 9 norms of 64.
    assert plan.dense.decoder_params == 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert plan.dense.total_params == plan.dense.decoder_params + 100 * 64 + 9 * 64
    assert plan.compact.decoder_params <= 0.6 * plan.dense.decoder_params
    assert plan.kept["decoder"] == plan.compact.decoder_params / plan.dense.decoder_params
    assert plan.compact.shape == plan.candidates[0]
    assert plan.compact.size_bytes == 2 * plan.compact.total_params
    assert plan.dense.lora_params == 4 * 16 * (2 * 128 + 2 * 96 + 3 * 256)
    share = plan.compact.flops_per_token / plan.dense.flops_per_token
    assert plan.relative_flops == pytest.approx((20 + 60 * share) / 80)
    assert plan.steps == 80


def test_memory_grows_with_what_it_should(run_file: Path) -> None:
    def memory(*overrides: str) -> dict[str, int]:
        return plan_run(load_config(run_file, overrides)).dense.memory

    plain = memory("train.bf16=false")
    assert "bfloat16 copies of them" not in plain
    assert memory("train.batch_size=16")["activations"] == 2 * memory("train.batch_size=8")["activations"]
    assert memory("train.activation_checkpointing=true")["activations"] < memory()["activations"]
    assert memory("model.dtype=bfloat16")["base weights"] * 2 == plain["base weights"]
    assert memory("lora.rank=32")["adapters and optimizer"] == 2 * plain["adapters and optimizer"]


def test_steps_come_from_the_rows_of_a_file(run_file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 100 + "\n")
    config = load_config(run_file, [f"data.train={rows}", "train.epochs=2"])
    assert count_rows(config) == 95
    assert plan_run(config).steps == 24
    assert count_rows(load_config(run_file, [f"data.train={rows}", "data.max_rows=20"])) == 20
    assert plan_run(load_config(run_file)).steps is None


def test_adapters_that_match_nothing_are_refused(run_file: Path) -> None:
    with pytest.raises(ConfigError, match="matches no linear"):
        plan_run(load_config(run_file, ["lora.targets=[query_proj]"]))
    some = plan_run(load_config(run_file, ["lora.targets=[q_proj, v_proj]"]))
    assert some.dense.lora_params == 4 * 16 * (128 + 96)


def test_choosing_while_training_is_counted_and_shown(run_file: Path) -> None:
    given = ["data.samples=q_tuning", "data.samples.kept=25%", "data.tokens=loss", "data.tokens.kept=70%"]
    plain = plan_run(load_config(run_file, ["train.max_steps=80"]))
    plan = plan_run(load_config(run_file, [*given, "train.max_steps=80"]))
    assert plain.relative_flops is not None
    assert plan.relative_flops == pytest.approx(0.75 * plain.relative_flops)
    result = invoke("plan", str(run_file), *given, width=80)
    shown = " ".join(result.output.split())
    assert "rows chosen while training by q_tuning, 25.0% stay" in shown
    assert "target tokens chosen while training by loss, 70.0% stay" in shown
    assert "2 of 8 a step and process" in shown
    assert not any("dearer" in text for text in plan.warnings)
    dearer = plan_run(load_config(run_file, ["data.samples=loss", "data.samples.kept=75%", "train.max_steps=80"]))
    assert any("25% dearer" in text for text in dearer.warnings)


def test_a_row_beyond_the_context_is_pointed_out(run_file: Path) -> None:
    plan = plan_run(load_config(run_file, ["train.max_length=512"]))
    assert any("beyond the model's context of 128 tokens" in text for text in plan.warnings)


@pytest.mark.parametrize("width", [80, 120])
def test_plan_fits_the_terminal(run_file: Path, width: int) -> None:
    result = invoke("plan", run_file, "train.max_steps=80", "train.max_length=64", width=width)
    assert result.exit_code == 0
    for said in ("parameters", "in the decoder's linears", "FLOPs a token", "activations", "warm-up", "80 steps"):
        assert said in result.output
    assert max(len(line) for line in result.output.splitlines()) <= width
