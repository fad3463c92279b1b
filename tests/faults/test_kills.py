"""Jobs that die at any moment, over and over, and end as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import Whole, Zygote, campaign


def require_unharmed(
    server: Zygote, root: Path, wholes: dict[str, Whole], jobs: dict[str, int], seed: int = 0
) -> dict[str, int]:
    tally = campaign(server, root, wholes, jobs, seed)
    assert not tally.mismatches, "\n".join(tally.mismatches)
    assert tally.kills >= sum(jobs.values())
    return dict(tally.places)


def test_a_few_kills_change_nothing(server: Zygote, root: Path, wholes: dict[str, Whole]) -> None:
    require_unharmed(server, root, wholes, {"run": 2, "merge": 2, "export": 1, "score": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "kills", "seed", "wanted"),
    [
        *(("run", 20, seed, {"checkpoint"}) for seed in range(1, 6)),
        ("merge", 40, 1, {"merging"}),
        ("export", 35, 1, {"exporting"}),
        ("score", 35, 1, {"scoring"}),
    ],
)
def test_two_hundred_kills_change_nothing(
    server: Zygote, root: Path, wholes: dict[str, Whole], job: str, kills: int, seed: int, wanted: set[str]
) -> None:
    assert wanted <= require_unharmed(server, root, wholes, {job: kills}, seed).keys()
