"""Two processes on a CPU (gloo) with a quantised base each, and one process, come to the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_engines import GOT, start
from tests.distributed.test_two_processes import saved
from tests.quantized.quantized_runs import quantized_folder
from tests.train.joint_runs import FREEZE_STEP, require_same

pytestmark = pytest.mark.slow  # starting two processes of torch takes longer than what they do
SCRIPT = "tests.quantized.two_processes_script"


@pytest.mark.parametrize(("engine", "kind"), [("ddp", "nf4"), ("ddp", "int8"), ("zero2", "nf4")])
def test_quantised_base_in_two_processes(tmp_path: Path, engine: str, kind: str) -> None:
    asked = {"script": SCRIPT, "base": str(quantized_folder(tmp_path / "base")), "kind": kind}
    first, second = start(tmp_path / "two", engine, rows=2, **asked)
    [alone] = start(tmp_path / "one", rows=4, **asked)
    assert first["engine"] == GOT[engine]
    assert first["processes"] == second["processes"] == 2
    assert first["plan"] == second["plan"] == alone["plan"] is not None
    assert first["losses"][:FREEZE_STEP] == pytest.approx(alone["losses"][:FREEZE_STEP], rel=1e-4)
    # Then the base is quantised again, and codes may tip (see below).
    assert first["losses"] == pytest.approx(alone["losses"], rel=2e-3)
    require_same(saved(tmp_path / "two", 0), saved(tmp_path / "two", 1))
    # Compensated weights differ in their last bits, which can tip a code: one step of its block's scale.
    together, apart = saved(tmp_path / "two"), saved(tmp_path / "one")
    assert together.keys() == apart.keys()
    for name, value in apart.items():
        tipped = (together[name] - value).abs() > 1e-3 * value.abs().max()
        assert tipped.float().mean() < 0.02, name
        assert torch.isfinite(value).all()
