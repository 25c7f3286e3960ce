"""How long a user waits: from the start of Python to the first finished round of a job on Ray, and of a second run after it.

python benchmarks/start.py                  # jobs/quickstart.yaml
python benchmarks/start.py --job jobs/quickstart.yaml --set rounds.num_rounds=2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

JOB = Path(__file__).parent.parent / "jobs" / "quickstart.yaml"


class Marks:
    """Seconds until the first event of each kind. Wall-clock time, because it starts in another process."""

    def __init__(self, since: float):
        self.since = since
        self.seconds: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        """An event of the run."""
        self.seconds.setdefault(event["kind"], time.time() - self.since)


def child(job: Path, assignments: list[str], workspace: Path, started: float) -> None:
    """Run the job twice in this process and print when each run's first round was over, in seconds."""
    from fleetune.engine.launch import cluster

    if cluster.names_ray(job, assignments):  # as the command line begins
        cluster.join(None)
    from fleetune.engine.launch.run import run
    from fleetune.spec import load, parse_overrides

    spec = load(job, parse_overrides(assignments))
    marks = []
    for since in (started, None):
        mark = Marks(since or time.time())
        run(spec, workspace=workspace, report=mark)
        marks.append(mark.seconds)
    print(json.dumps(marks), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=JOB)
    parser.add_argument("--set", action="append", default=["rounds.num_rounds=2"], help="path.to.field=value")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        with tempfile.TemporaryDirectory(prefix="fleetune-bench-") as folder:
            child(args.job, args.set, Path(folder), args.child)
        return
    first, second, rows = [], [], []
    for _ in range(args.repeats):
        command = [sys.executable, __file__, "--job", str(args.job), "--child", repr(time.time())]
        out = subprocess.run(command + [f"--set={x}" for x in args.set], capture_output=True, text=True, check=True)
        marks = json.loads(out.stdout.strip().splitlines()[-1])
        first.append(marks[0])
        second.append(marks[1])
    for name, marks in (("first run, from the start of Python", first), ("second run of the same process", second)):
        for kind, what in (
            ("start", "first round begins"),
            ("round", "first round on record"),
            ("end", "run finished"),
        ):
            median, best = measure.median_and_min([m[kind] for m in marks])
            rows.append({"run": name, "until": what, "seconds": median, "best_seconds": best})
    measure.report("start", rows)


if __name__ == "__main__":
    main()
