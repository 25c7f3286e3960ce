"""Sweeps killed at random points, again and again: the table of an undisturbed one, and MLflow has every trial once.

python tests/kill_sweeps.py --repeats 10        # about a minute each
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fleetune.records import find_runs
from support import commands
from support.commands import started
from support.sweeping import in_mlflow, sweep_file


def launch(path: Path, workspace: Path, *, kill_after_seconds: float | None = None) -> bool:
    """Launch the sweep; True where it came to its end."""
    with started("sweep", path, "-w", workspace, "--json") as process:
        if kill_after_seconds is None:
            out = commands.finish(process, timeout_seconds=600)
            assert out.status == 0, out.stderr
            return True
        try:
            process.wait(kill_after_seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return False
        return True


def table(workspace: Path) -> pa.Table:
    """The sweep's table as it is stored: run directories are noted relative to it."""
    (path,) = workspace.glob("sweeps/*/trials.parquet")
    return pq.read_table(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="fleetune-kills-"))
    grid = {"method.growth_rate": [2, 3, 4], "seed": [0, 1]}
    path = sweep_file(folder, base={"tracking.enabled": True, "local.steps": 60}, grid=grid, metric="eval_loss")
    began = time.time()
    launch(path, folder / "whole")
    expected = table(folder / "whole")
    recorded = [at_ms / 1000 - began for run in find_runs([folder / "whole"]) for _, at_ms in run.round_rows()]
    first, last = min(recorded), max(recorded)
    print(f"undisturbed: {expected.num_rows} trials, rounds from {first:.0f} to {last:.0f} s after launch", flush=True)
    num_wrong = 0
    for repeat in range(args.repeats):
        workspace = folder / f"killed-{repeat}"
        after = draw.uniform(0.8 * first, last)
        was_whole = launch(path, workspace, kill_after_seconds=after)
        over = len(list(workspace.glob("runs/*/result.json")))
        launch(path, workspace)
        found = table(workspace)
        names = [*found["run_id"].to_pylist(), next((workspace / "sweeps").iterdir()).name]
        problems = [] if found.equals(expected) else ["the table differs"]
        counts = in_mlflow(workspace)
        problems += [] if counts == dict.fromkeys(names, 1) else [f"MLflow has {counts}"]
        when = "not killed" if was_whole else f"killed after {after:.1f} s with {over} trials over"
        print(f"{repeat}: {when}: {', '.join(problems) or 'the same table, every trial once'}", flush=True)
        num_wrong += bool(problems)
    if not num_wrong:
        shutil.rmtree(folder)
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
