"""A sweep with claims from its file to MLflow: verdicts at its end, and other claims on the same trials without running any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fleetune.engine.launch import run as launch
from fleetune.errors import UserError
from fleetune.records import SweepDirectory
from fleetune.sweep import config
from fleetune.sweep import launch as sweeps
from fleetune.sweep.expansion import trials_of
from support.commands import fleetune
from support.sweeping import sweep_file

GRID = {"method.growth_rate": [2, 4]}
FALLS = {"falls": "eval/loss", "over": "method.growth_rate", "source": "table 5"}
RATIO = {
    "ratio": {
        "of": {"method.growth_rate": 2},
        "to": {"method.growth_rate": 2.0},
        "in": "uplink_bytes",
        "is": 1,
        "within": 0.1,
    }
}


def study(folder: Path, *claims: Any) -> Path:
    base = {"tracking.enabled": True, "rounds.num_rounds": 3}
    return sweep_file(folder, base=base, grid=GRID, seeds=[0, 1], claims=list(claims))


def no_ray(*_: Any, **__: Any) -> None:
    raise AssertionError("a trial is to be run")


@pytest.mark.slow
def test_other_claims_on_a_finished_sweep_run_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Its four trials are there as runs. First without a claim, then with one, on the terminal, in files and in MLflow."""
    for trial in trials_of(config.load(study(tmp_path))):
        untracked = trial.spec.tracking.model_copy(update={"enabled": False})
        launch.run(trial.spec.model_copy(update={"tracking": untracked}), workspace=tmp_path, warn=print)
    monkeypatch.setattr(sweeps, "_prepare", no_ray)
    plain = sweeps.run(config.load(study(tmp_path)), workspace=tmp_path, text="no claims", warn=print)
    assert (plain.trials, plain.claims) == ({"finished": 4}, [])
    assert "claims" not in plain.to_dict()

    out = fleetune(capfd, monkeypatch, "sweep", study(tmp_path, FALLS), "-w", tmp_path)
    (shown,) = [line for line in out.stdout.splitlines() if line.startswith("claims")]
    assert "eval/loss falls over growth_rate (table 5)" in shown
    directory = SweepDirectory.open(plain.sweep_dir)
    assert directory.spec["claims"] == [FALLS]
    (verdict,) = directory.verdicts()
    assert (verdict["num_seeds"], verdict["num_pairs"], verdict["num_left_out"]) == (2, 2, 0)
    assert shown.endswith(verdict["line"])
    assert "table 5" in (directory.path / "report.html").read_text()
    assert "claims:" in directory.meta["text"]
    assert [path.name for path in (tmp_path / "sweeps").iterdir()] == [plain.sweep_dir.name]
    assert claim_tags(tmp_path) == {"claims": f"{verdict['verdict']} 1", "claim/01": verdict["line"]}

    again = fleetune(capfd, monkeypatch, "report", directory.path, "--json").document
    assert again["claims"] == [verdict]
    json.dumps(again)


def claim_tags(workspace: Path) -> dict[str, str]:
    """The tags of claims in the workspace's store."""
    import sqlite3

    with sqlite3.connect(workspace / "mlflow.db") as store:
        return dict(store.execute("select key, value from tags where key = 'claims' or key like 'claim/%'"))


def test_a_claim_that_cannot_be_decided_is_refused_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """On the command line: status 2, the field, and no directory. 2 and 2.0 are the same setting."""
    out = fleetune(capfd, monkeypatch, "sweep", study(tmp_path, FALLS, RATIO), "-w", tmp_path / "ws", "--json")
    assert (out.status, out.document["field"]) == (2, "claims.1.ratio.to")
    assert "the same setting as the other side" in out.stderr
    assert not (tmp_path / "ws").exists()


def test_a_huge_grid_is_refused_before_its_pairs_are_listed(tmp_path: Path):
    grid = {"method.growth_rate": list(range(2, 502)), "local.steps": list(range(1, 502))}
    path = sweep_file(tmp_path, grid=grid, seeds=[0, 1], claims=[FALLS])
    with pytest.raises(UserError, match="combinations, more than"):
        trials_of(config.load(path))
