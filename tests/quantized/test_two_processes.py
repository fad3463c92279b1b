"""Two processes on a CPU (gloo) with a quantised base each, and one process, come to the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_engines import GOT, start
from tests.distributed.test_two_processes import saved
from tests.quantized.quantized_runs import quantized_folder
from tests.train.joint_runs import require_same

pytestmark = pytest.mark.slow  # starting two processes of torch takes longer than what they do
SCRIPT = "tests.quantized.two_processes_script"


REFIT = {"method": "refit", "tokens": 256}


# int8 follows the refit's last bits with whole codes, so there the cut is compared without one.
@pytest.mark.parametrize(
    ("engine", "kind", "compensation"),
    [("ddp", "nf4", REFIT), ("ddp", "int8", {"method": "none"}), ("zero2", "nf4", REFIT)],
    ids=["ddp-nf4", "ddp-int8", "zero2-nf4"],
)
def test_quantised_base_in_two_processes(tmp_path: Path, engine: str, kind: str, compensation: dict[str, Any]) -> None:
    base = str(quantized_folder(tmp_path / "base"))
    asked = {"script": SCRIPT, "base": base, "kind": kind, "compensation": compensation}
    first, second = start(tmp_path / "two", engine, rows=2, **asked)
    [alone] = start(tmp_path / "one", rows=4, **asked)
    assert first["engine"] == GOT[engine]
    assert first["processes"] == second["processes"] == 2
    assert first["plan"] == second["plan"] == alone["plan"] is not None
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    require_same(saved(tmp_path / "two", 0), saved(tmp_path / "two", 1))
    # Compensated weights differ in their last bits, which can tip a code: one step of its block's scale.
    together, apart = saved(tmp_path / "two"), saved(tmp_path / "one")
    assert together.keys() == apart.keys()
    for name, value in apart.items():
        tipped = (together[name] - value).abs() > 1e-3 * value.abs().max()
        assert tipped.float().mean() < 0.02, name
        assert torch.isfinite(value).all()
