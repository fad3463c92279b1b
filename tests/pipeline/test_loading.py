"""The base is mapped from its files, not copied: processes of one machine that read it whole share its memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prunetune.model.resolve import resolve_model
from prunetune.pipeline.loading import load_for_training
from tests.support import tiny_folder


def mapped(file: Path) -> list[range]:
    """The addresses at which this process has mapped a file."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path == str(file.resolve()):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(range(start, end))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_in_the_dtype_of_the_files_are_the_mapped_files(tmp_path: Path, dtype: str) -> None:
    folder = tiny_folder(tmp_path / "model")  # in float32
    model = load_for_training(resolve_model(str(folder)), dtype)
    places = mapped(folder / "model.safetensors")
    inside = [any(weight.data_ptr() in place for place in places) for weight in model.parameters()]
    assert all(inside) if dtype == "float32" else not any(inside)
