"""kill -9 in the middle of a run, then `fleetune resume`: the same bits as a run that nobody touched."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from fleetune.engine.launch import run as launch
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import load
from support import commands
from support.commands import end_group, started

NUM_ROUNDS = 30


def kill_when_recorded(process: subprocess.Popen[str], workspace: Path, *, num_rounds: int) -> Path:
    """kill -9 as soon as so many rounds are recorded; returns the run directory."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        done = list(workspace.glob("runs/*/checkpoint/records/round_*.arrow"))
        if len(done) >= num_rounds:
            family = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            end_group(process, family)
            assert process.returncode == -signal.SIGKILL
            return done[0].parent.parent.parent
        time.sleep(0.01)
    raise AssertionError("no round was recorded in time")


def same_runs(one: Path, other: Path) -> None:
    """All records but the run's name and its wall time, and the adapter's files."""
    a, b = RunDirectory.open(one), RunDirectory.open(other)
    differing = ["run_id", "wall_seconds"]
    for rows, other_rows in ((a.rounds(), b.rounds()), (a.clients(), b.clients())):
        pd.testing.assert_frame_equal(
            rows.drop(columns=differing), other_rows.drop(columns=differing), check_exact=True
        )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    results = [run.result() or {} for run in (a, b)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["totals"]["sim_seconds"] == results[1]["totals"]["sim_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"), [("serial", "fedsa-lora"), pytest.param("ray", "devft", marks=pytest.mark.ray)]
)
def test_a_killed_run_goes_on_bit_for_bit(kind: str, method: str, tmp_path: Path):
    overrides = {
        "rounds.num_rounds": NUM_ROUNDS,
        "evaluation.every": NUM_ROUNDS,
        "execution.kind": kind,
        "execution.workers": 1,
    }
    job = commands.job_file(tmp_path, overrides, method=method)
    with started("run", job, "-w", tmp_path / "killed") as process:
        run_path = kill_when_recorded(process, tmp_path / "killed", num_rounds=2)
    recorded = len(RunDirectory.open(run_path).rounds())
    assert 2 <= recorded < NUM_ROUNDS
    assert not (run_path / "result.json").exists()

    with started("resume", run_path, "--json") as process:
        resumed = commands.finish(process)
    assert resumed.status == 0, resumed.stderr
    assert resumed.document["status"] == "finished"
    assert "going on after round" in resumed.stderr

    untouched = launch.run(load(job, {"execution.kind": "serial"}), workspace=tmp_path / "untouched")
    same_runs(run_path, untouched.run_dir)
