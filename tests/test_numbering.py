"""One numbering of rounds, from 1, with the untrained model at 0: tables, timeline, progress, plan, figures and MLflow agree."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fleetune.cli.progress import Lines
from fleetune.engine.launch import run as launch
from fleetune.plan.walk import plan
from fleetune.records import RunDirectory
from fleetune.reports.run_stats import rounds_from_the_start
from fleetune.tracking.sync import sync
from support import tiny
from support.stored import steps

ROUNDS = [1, 2, 3, 4]
OVERRIDES = {"rounds.num_rounds": 4, "evaluation.every": 2, "evaluation.generate": False}


def test_a_round_has_one_number_wherever_it_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Stopped after two rounds, gone on with, planned and sent to MLflow."""
    spec = tiny.spec(OVERRIDES)

    def stop(event: launch.Event) -> None:
        if event["kind"] == "round":
            assert event["row"]["round"] == event["round"]
        if event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.run(spec, workspace=tmp_path, report=stop)
    (run_path,) = (tmp_path / "runs").iterdir()
    run_dir = RunDirectory.open(run_path)
    assert [path.stem for path in sorted(run_path.rglob("round_*.arrow"))] == ["round_00000001", "round_00000002"]
    assert run_dir.num_recorded() == 2
    capsys.readouterr()
    launch.resume(run_path, report=Lines("tiny"))
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].endswith("going on after round 2")
    assert [line.partition(" · ")[0] for line in shown[1:]] == ["round 3/4", "round 4/4"]

    assert run_dir.rounds()["round"].tolist() == ROUNDS
    assert sorted(set(run_dir.clients()["round"])) == ROUNDS
    assert [row["round"] for row, _ in run_dir.round_rows(first_round=3)] == [3, 4]
    events = json.loads((run_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e["name"].startswith("round ")] == [f"round {number}" for number in ROUNDS]
    planned = plan(spec, cache_dir=tmp_path)
    assert [row["round"] for row in planned.rounds] == ROUNDS
    assert sorted({row["round"] for row in planned.devices}) == ROUNDS

    curve = rounds_from_the_start(run_dir)
    evaluated = curve["round"][curve["eval_loss"].notna()].tolist()
    sent = sync(run_path)
    held = steps(sent.uri, sent.mlflow_run_id)
    assert curve["round"].tolist() == [0, *ROUNDS]
    assert evaluated == held["eval/loss"] == [0, 2, 4]
    assert held["train/loss"] == held["total/uplink_bytes"] == ROUNDS
    assert math.isclose(curve["eval_loss"].iloc[0], run_dir.meta["baseline"]["eval_loss"])
