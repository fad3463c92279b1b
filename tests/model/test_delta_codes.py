"""Places of survivors: what was coded is read again, whole or any rows of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from prunetune.model.delta_codes import bits, bits_width, from_bits, from_gaps, gap_lengths, gaps
from prunetune.model.tensor_spool import TensorSpool, tensor_digest


def mask(rows: int, columns: int, keep: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.rand(rows, columns, generator=generator) < keep


# Gaps of 254, 255, 256 and several times 255; widths that fill bytes and that do not; rows with nothing.
EDGES = torch.zeros(4, 1100, dtype=torch.bool)
EDGES[0, [0, 255, 511, 768, 1099]] = True
EDGES[2, [1099]] = True
EDGES[3, [254, 764]] = True
MASKS = [EDGES, torch.ones(3, 5).bool(), torch.zeros(3, 5).bool(), torch.zeros(0, 5).bool(), torch.ones(2, 1).bool()]
MASKS += [mask(7, columns, keep) for columns in (1, 8, 9, 300, 3000) for keep in (0.001, 0.05, 0.5, 0.99)]


@pytest.mark.parametrize("stays", MASKS, ids=lambda stays: f"{len(stays)}x{stays.shape[1]}-{int(stays.sum())}")
def test_codes_come_back(stays: torch.Tensor) -> None:
    rows, columns = stays.shape
    coded, lengths = gaps(stays), gap_lengths(stays)
    assert int(lengths.sum()) == len(coded)
    found = from_gaps(coded, lengths, columns)
    assert found is not None
    assert torch.equal(found, stays)
    starts = [0, *lengths.cumsum(0).tolist()]
    for row in range(rows):
        part = from_gaps(coded[starts[row] : starts[row + 1]], lengths[row : row + 1], columns)
        assert part is not None
        assert torch.equal(part[0], stays[row])
    assert len(bits(stays)) == rows * bits_width(columns)
    assert torch.equal(from_bits(bits(stays), columns), stays)


def test_a_survivor_costs_a_byte_where_few_survive() -> None:
    stays = mask(50, 3000, 0.01)
    assert len(gaps(stays)) < 1.1 * int(stays.sum())


@pytest.mark.parametrize(
    ("coded", "lengths"), [([7], [1]), ([0, 255], [2]), ([255, 0], [2]), ([3, 3], [2]), ([0, 255, 0], [2, 1])]
)
def test_gaps_beyond_the_row_are_none(coded: list[int], lengths: list[int]) -> None:
    assert from_gaps(torch.tensor(coded, dtype=torch.uint8), torch.tensor(lengths), 7) is None


def test_a_spool_makes_the_file_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "halves": torch.randn(5).to(torch.bfloat16),
        "wide": torch.arange(4),
        "none": torch.zeros(0, dtype=torch.int16),
        "matrix": torch.randn(3, 2),
    }
    spool = TensorSpool(tmp_path)
    for name, tensor in tensors.items():
        if tensor.dim() == 1 and len(tensor):
            spool.append(name, tensor[:2])
            spool.append(name, tensor[2:])
        else:
            spool.add(name, tensor)
    assert spool.digests() == {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    spool.finish(tmp_path / "file.safetensors", {"said": "so"})
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == {"said": "so"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
