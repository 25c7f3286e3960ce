"""How long a plan takes: whole commands from an empty cache and from a warm one, and 10,000 clients in each of 300 rounds.

python benchmarks/plan.py
python benchmarks/plan.py --repeats 5
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

JOBS = Path(__file__).parent.parent / "jobs"
LARGE = [
    "fleet.num_clients=10000",
    "rounds.clients_per_round=10000",
    "rounds.num_rounds=300",
    "data.num_examples=100000",
]
CASES: dict[str, tuple[Path, list[str]]] = {
    "quickstart": (JOBS / "quickstart.yaml", []),
    "devft on llama2-7b, 40 rounds": (JOBS / "paper" / "devft_on_jetson.yaml", []),
    "devft on llama2-13b, 320 rounds": (JOBS / "paper" / "devft_uplink_13b.yaml", []),
    "10,000 clients x 300 rounds": (JOBS / "methods" / "devft.yaml", ["model.base=tinyllama-1.1b", *LARGE]),
}


def seconds_of(job: Path, assignments: list[str], cache: Path) -> float:
    """The whole command, from starting Python to its last line."""
    sets = [word for assignment in assignments for word in ("--set", assignment)]
    command = [sys.executable, "-m", "fleetune", "plan", str(job), *sets, "--json"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "FLEETUNE_CACHE": str(cache)})
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for name, (job, assignments) in CASES.items():
        with tempfile.TemporaryDirectory(prefix="fleetune-bench-") as folder:
            cold = seconds_of(job, assignments, Path(folder))
            warm = [seconds_of(job, assignments, Path(folder)) for _ in range(args.repeats)]
        median, best = measure.median_and_min(warm)
        rows.append({"plan": name, "first_seconds": cold, "cached_seconds": median, "best_seconds": best})
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    measure.report("plan", [*rows, {"plan": "most memory of any", "gib": peak / 2**30}])


if __name__ == "__main__":
    main()
