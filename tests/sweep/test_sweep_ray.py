"""Sweeps on Ray of this machine: the table of an undisturbed one, and the same whatever happens on the way."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest

from fleetune.records import SweepDirectory
from fleetune.sweep import config
from fleetune.sweep.expansion import sweep_id
from fleetune.sweep.status import SweepStatus
from support.commands import started
from support.sweeping import (
    GRID,
    NUM_ROUNDS,
    children,
    in_mlflow,
    kill_after,
    local_ray,
    one_by_one,
    same_as,
    sweep,
    sweep_file,
)

__all__ = ["local_ray"]

CLAIMS = [
    {"rises": "uplink_bytes", "over": "method.growth_rate", "source": "by arithmetic: the whole model comes sooner"},
    {"rises": "sim_seconds", "over": "method.growth_rate", "until": {"eval_loss": "common"}},
]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_sweep_and_what_a_further_launch_finds(tmp_path: Path):
    """Four trials equal four runs by themselves, and decide claims. Launched again nothing is run; with another grid only what is
    new.
    """
    path = sweep_file(tmp_path, base={"tracking.enabled": True}, grid=GRID, metric="eval_loss", claims=CLAIMS)
    result = sweep(path, tmp_path)
    assert result.trials == {"finished": 4}
    slower, common = result.claims
    assert (slower["verdict"], slower["num_pairs"]) == ("holds", 2)
    assert "to the common eval_loss" in common["claim"]
    shown = "\n".join(result.lines())
    assert all(claim["line"] in shown for claim in result.claims)
    assert SweepDirectory.open(result.sweep_dir).verdicts() == result.claims
    directory = SweepDirectory.open(result.sweep_dir)
    same_as(directory, one_by_one(path))
    table = directory.trials()
    assert result.best is not None
    assert result.best["trial"] == int(table["eval_loss"].argmin())
    assert table["set.method.growth_rate"].tolist() == [2, 2, 4, 4]
    assert (directory.path / "report.html").is_file()
    assert in_mlflow(tmp_path) == dict.fromkeys([*table["run_id"], directory.path.name], 1)

    written = {run.path: (run.path / "result.json").stat().st_mtime_ns for run in directory.runs()}
    assert sweep(path, tmp_path) == result
    tracked = {"tracking.enabled": True}
    other = sweep_file(tmp_path, base=tracked, grid={"method.growth_rate": [2, 3], "seed": [0, 1]})
    second = sweep(other, tmp_path)
    more = SweepDirectory.open(second.sweep_dir).trials()
    assert (result.synced, second.synced) == (True, True)
    assert children(tmp_path, second.sweep_dir) == sorted(more["run_id"])
    assert children(tmp_path, result.sweep_dir) == sorted(table["run_id"])
    assert more["run_id"].tolist()[:2] == table["run_id"].tolist()[:2]
    assert not set(more["run_id"][2:]) & set(table["run_id"])
    assert {place: (place / "result.json").stat().st_mtime_ns for place in written} == written


def test_a_trial_that_fails_or_dies_does_not_stop_the_others(tmp_path: Path):
    """One cannot make its directory; another's process is killed in the middle and goes on elsewhere; the table says both."""
    path = sweep_file(tmp_path)
    spec = config.load(path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{sweep_id(spec)}-001").write_text("in the way")
    killed: list[int] = []
    terminal = threading.Lock()  # what shows progress on a terminal holds one, and cannot be stored

    def kill_one(sweep_status: SweepStatus) -> None:
        assert not terminal.locked()
        if not killed and any(entry.num_rounds == 2 for entry in sweep_status.entries.values()):
            process = next(
                p for p in psutil.process_iter(["cmdline"]) if "TrialProcess" in " ".join(p.info["cmdline"] or ())
            )
            killed.append(process.pid)
            process.kill()

    result = sweep(path, tmp_path, kill_one)
    assert killed
    assert result.trials == {"finished": 3, "failed": 1}
    assert [failure["trial"] for failure in result.failures] == [1]
    table = SweepDirectory.open(result.sweep_dir).trials()
    assert table["status"].tolist() == ["finished", "failed", "finished", "finished"]
    assert "-001" in table["error"][1]

    (tmp_path / "runs" / f"{sweep_id(spec)}-001").unlink()
    assert sweep(path, tmp_path).trials == {"finished": 4}
    same_as(SweepDirectory.open(result.sweep_dir), one_by_one(path))


def test_trials_that_fall_behind_are_stopped_and_stay_so(tmp_path: Path):
    """One at a time, from the best learning rate to the worst. At rung 1 a trial goes on if it is in the best half of those that
    were there: the first always, the worse ones after it not. A further launch leaves them as they are.
    """
    rates = [0.1, 0.03, 0.0001, 0.00001]
    fields = {"grid": {"local.learning_rate": rates}, "early_stopping": {"grace_rounds": 1, "reduction_factor": 2}}
    path = sweep_file(tmp_path, **fields, max_concurrent=1)
    result = sweep(path, tmp_path)
    table = SweepDirectory.open(result.sweep_dir).trials()
    losses = [one.rounds["eval_loss"] for one in one_by_one(path)]
    assert [loss[0] for loss in losses] == sorted(loss[0] for loss in losses)
    assert table["status"].tolist() == ["finished", "stopped", "stopped", "stopped"]
    assert table["num_rounds"].tolist() == [NUM_ROUNDS, 1, 1, 1]
    assert table["eval_loss"].tolist() == [losses[0].iloc[-1], *(loss[0] for loss in losses[1:])]
    assert sweep(path, tmp_path) == result


def test_a_killed_sweep_goes_on_bit_for_bit(tmp_path: Path):
    """kill -9 of the command in the middle; the next launch makes the table of an undisturbed sweep, and MLflow has all once."""
    path = sweep_file(tmp_path, base={"tracking.enabled": True})
    with started("sweep", path, "-w", tmp_path) as process:
        kill_after(process, tmp_path, num_rounds=3, timeout_seconds=120)
        before = SweepDirectory.open(next((tmp_path / "sweeps").iterdir())).trials()["status"].tolist()
        assert before.count("finished") < 4
        result = sweep(path, tmp_path)
    directory = SweepDirectory.open(result.sweep_dir)
    same_as(directory, one_by_one(path))
    assert in_mlflow(tmp_path) == dict.fromkeys([*directory.trials()["run_id"], directory.path.name], 1)
