"""What kills cost: small real jobs die at random points, are started again, and must end as if nothing had been.

python scripts/bench/faults.py --kills 200 --out faults.json

Writes JSON: kills, resumes, mismatches (what differed from the job that was never killed; must be empty), seconds lost
per kill (work done twice, and starting again; both without the imports, which a fork saves here), and where they fell.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.harness import campaign, whole_jobs, zygote

# Of ten kills, how many fall on each job.
SHARES = {"run": 4, "merge": 2, "export": 2, "score": 2}


def main() -> None:
    """Runs the campaign and writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("faults.json"))
    arguments = parser.parse_args()
    jobs = {job: -(-arguments.kills * share // sum(SHARES.values())) for job, share in SHARES.items()}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, zygote() as server:
        wholes = whole_jobs(server, Path(scratch))
        tally = campaign(server, Path(scratch), wholes, jobs, arguments.seed)
    found = {
        "kills": tally.kills,
        "resumes": tally.resumes,
        "jobs_that_ended": tally.chains,
        "mismatches": tally.mismatches,
        "seconds_lost_per_kill": round(tally.seconds_lost / tally.kills, 2),
        "seconds_of_a_whole_job": {job: round(wholes[job].seconds, 2) for job in SHARES},
        "file_operations_of_a_whole_job": {job: wholes[job].writes for job in SHARES},
        "kills_by_place": dict(tally.places.most_common()),
        "seconds": round(time.monotonic() - began),
    }
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    sys.exit(1 if tally.mismatches else 0)


if __name__ == "__main__":
    main()
