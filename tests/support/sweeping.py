"""Sweeps of the tiny world, and what they must come to: every trial by itself."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from fleetune.engine.launch import backends
from fleetune.records import RunDirectory, SweepDirectory
from fleetune.sweep import config
from fleetune.sweep import launch as sweeps
from fleetune.sweep.expansion import trials_of
from fleetune.sweep.status import SweepStatus
from support import commands, runs, tiny

NUM_ROUNDS = 4
GRID = {"method.growth_rate": [2, 4], "seed": [0, 1]}


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """Ray of this process, started by the first sweep and used by all."""
    backends.shutdown()
    yield
    backends.shutdown()


def sweep_file(folder: Path, *, base: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Two growth rates and two seeds of the tiny DevFT, four rounds each, unless told otherwise."""
    quick = {"rounds.num_rounds": NUM_ROUNDS, "evaluation.every": 1, "execution.kind": "serial", "execution.workers": 1}
    spec = tiny.spec({**commands.QUICK, **quick, **(base or {})}, method="devft")
    values = {"name": "growth", "base": spec.to_dict(), "metric": "eval_loss", **(fields or {"grid": GRID})}
    path = folder / "growth.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def sweep(
    path: Path, workspace: Path, report: Callable[[SweepStatus], None] | None = None, *, address: str | None = None
) -> sweeps.SweepResult:
    """Run a sweep in this process."""
    return sweeps.run(config.load(path), workspace=workspace, address=address, report=report, warn=print)


def kill_after(process: subprocess.Popen[str], workspace: Path, *, num_rounds: int, timeout_seconds: float) -> None:
    """kill -9 of a sweep's command once its trials have recorded so many rounds together."""
    deadline = time.monotonic() + timeout_seconds
    while len(list(workspace.glob("runs/*/checkpoint/records/round_*.arrow"))) < num_rounds:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def one_by_one(path: Path) -> list[runs.Finished]:
    """Every trial by itself in this process, without Ray and Tune: what the sweep must come to."""
    return [runs.run(trial.spec) for trial in trials_of(config.load(path))]


def same_as(found: SweepDirectory, expected: list[runs.Finished]) -> None:
    """Every trial's records, bit for bit, and the table made from them."""
    table = found.trials()
    assert table["status"].tolist() == ["finished"] * len(expected)
    for place, loss, alone in zip(table["run_dir"], table["eval_loss"], expected, strict=True):
        run = RunDirectory.open(place)
        told = ["run_id", "wall_seconds"]
        for mine, theirs in ((run.rounds(), alone.run_dir.rounds()), (run.clients(), alone.run_dir.clients())):
            pd.testing.assert_frame_equal(mine.drop(columns=told), theirs.drop(columns=told), check_exact=True)
        assert loss == alone.rounds["eval_loss"].iloc[-1]


def children(workspace: Path, sweep_dir: Path) -> list[str]:
    """fleetune's ids of the runs that stand under a sweep's in MLflow, in order."""
    own = "select run_uuid from tags where key = 'fleetune_run_id' and value = ?"
    under = f"select run_uuid from tags where key = 'mlflow.parentRunId' and value in ({own})"
    with sqlite3.connect(workspace / "mlflow.db") as store:
        found = f"select value from tags where key = 'fleetune_run_id' and run_uuid in ({under})"
        return sorted(run_id for (run_id,) in store.execute(found, [sweep_dir.name]))


def in_mlflow(workspace: Path) -> dict[str, int]:
    """fleetune's run id -> how many runs MLflow has of it; all but the sweep are children, every step is there once."""
    with sqlite3.connect(workspace / "mlflow.db") as store:
        counts = dict(store.execute("select value, count(*) from tags where key = 'fleetune_run_id' group by value"))
        parents = store.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone()[0]
        steps = "select count(*) from metrics where key = 'train/loss' group by run_uuid, step"
        assert [n for (n,) in store.execute(steps)] == [1] * (NUM_ROUNDS * (len(counts) - 1))
    assert parents == len(counts) - 1
    return counts
