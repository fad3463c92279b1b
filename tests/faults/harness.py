"""Campaigns of kills: a job is killed, started again, killed again, until it ends well; then what it left is judged."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.jobs import adapters, half_written, outcome, prepare

KILLED = ("run", "merge", "export", "score")
REPOSITORY = Path(__file__).parents[2]
# A chain that was killed so often is let through, so that every chain ends with a judgement.
_MOST_KILLS_A_CHAIN = 6
_LARGEST_FILE_BYTES = 60_000


class Zygote:
    """The process that serves cases; see zygote.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
            text=True,
        )

    def serve(self, job: str, root: Path, folder: Path, kill: dict[str, Any] | None = None) -> dict[str, Any]:
        """Runs a job in a fork; see zygote.py for ``kill`` and the answer."""
        assert self._process.stdin
        assert self._process.stdout
        folder.mkdir(parents=True, exist_ok=True)
        case = {"job": job, "root": str(root), "folder": str(folder), "kill": kill}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)


@contextmanager
def zygote() -> Iterator[Zygote]:
    """A zygote for a while."""
    process = Zygote()
    try:
        yield process
    finally:
        process.close()


@dataclass(frozen=True)
class Whole:
    """A job that was never killed: what it left, its file operations, how long it took."""

    outcome: dict[str, Any]
    adapters: dict[str, str]
    writes: int
    seconds: float


@dataclass
class Tally:
    """What a campaign found."""

    kills: int = 0
    resumes: int = 0
    chains: int = 0
    mismatches: list[str] = field(default_factory=list)
    seconds_lost: float = 0.0
    places: Counter[str] = field(default_factory=Counter)


def whole_jobs(server: Zygote, root: Path) -> dict[str, Whole]:
    """Runs every job once without a kill; the run comes first, because an export takes its model."""
    prepare(root)
    found = {}
    for job in ("kept", *KILLED[1:]):
        folder = root / "whole" / job
        answer = server.serve(job, root, folder)
        if answer["status"]:
            raise AssertionError(f"{job} fails without any kill:\n{folder.with_suffix('.log').read_text()[-3000:]}")
        known = adapters(folder) if job == "kept" else {}
        found[job] = Whole(outcome(job, folder), known, answer["writes"], answer["seconds"])
    found["run"] = found["command"] = found["kept"]
    return found


def draw(rng: random.Random, whole: Whole) -> dict[str, Any]:
    """Where the next blow falls: before a file operation, inside a write, or at any moment."""
    kind = rng.random()
    if kind < 0.2:
        return {"seconds": rng.uniform(0, whole.seconds)}
    write = rng.randint(1, whole.writes)
    if kind < 0.5:
        return {"write": write, "bytes": int(_LARGEST_FILE_BYTES ** rng.random())}
    return {"write": write}


def campaign(server: Zygote, root: Path, wholes: dict[str, Whole], jobs: dict[str, int], seed: int = 0) -> Tally:
    """Kills jobs until each has died so often as ``jobs`` says.

    Returns:
        The tally; ``mismatches`` must be empty.
    """
    tally = Tally()
    for job, wanted in jobs.items():
        # The same blows whatever happened before.
        rng, before = random.Random(f"{seed} {job}"), tally.kills
        while tally.kills - before < wanted:
            _chain(server, root, job, wholes[job], rng, tally)
    return tally


def _chain(server: Zygote, root: Path, job: str, whole: Whole, rng: random.Random, tally: Tally) -> None:
    tally.chains += 1
    folder = root / "chains" / f"{job}-{tally.chains}"
    seconds, killed, blows = 0.0, 0, []
    while True:
        kill = draw(rng, whole) if killed < _MOST_KILLS_A_CHAIN else None
        blows.append(kill)
        answer = server.serve(job, root, folder, kill)
        seconds += answer["seconds"]
        if answer["signal"]:
            killed += 1
            tally.places[place(job, answer["at"])] += 1
            tally.mismatches += [
                f"{folder.name} {blows} at {answer['at']}: {fault}"
                for fault in half_written(job, folder, whole.outcome, whole.adapters)
            ]
            continue
        if answer["status"]:
            log = folder.with_suffix(".log").read_text()[-2000:]
            tally.mismatches.append(f"{folder.name} {blows} last at {answer['at']}: does not go on:\n{log}")
        elif outcome(job, folder) != whole.outcome:
            tally.mismatches.append(f"{folder.name} {blows}: what came out differs")
        elif remains := [str(path.relative_to(folder)) for path in folder.rglob("*.partial")]:
            tally.mismatches.append(f"{folder.name} {blows}: remains {remains}")
        break
    tally.kills += killed
    tally.resumes += killed
    tally.seconds_lost += max(0.0, seconds - whole.seconds) if killed else 0.0
    if not tally.mismatches:
        shutil.rmtree(folder)


def place(job: str, path: str) -> str:
    """The part of the job that a path belongs to, in one or two words."""
    first = path.partition("/")[0]
    if job != "run":
        return {"merge": "merging", "export": "exporting", "score": "scoring"}[job]
    if first == "train":
        return "freeze and slicing" if "freeze" in path else "checkpoint" if "checkpoint-" in path else "training"
    return "exporting" if "compact" in first else "report" if "figure" in first or "report" in path else "run folder"
