"""Sweeps in MLflow that share trials: under each parent every trial once, its best tagged, however often it is sent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fleetune.records import RunDirectory, SweepDirectory
from fleetune.tracking.client import make_client
from fleetune.tracking.store import default_uri
from fleetune.tracking.sweep import SweepTracker
from fleetune.tracking.sync import sync
from fleetune.tracking.tracker import Tracker
from support.stored import expected_steps, steps
from support.synthetic_runs import make_run, make_spec

Rows = list[tuple[int, RunDirectory, float | None]]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs: making one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    make_client(default_uri(folder))
    return folder / "mlflow.db"


@pytest.fixture
def workspace(empty_store: Path, tmp_path: Path) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def make_sweep(workspace: Path, name: str, **fields: Any) -> SweepDirectory:
    spec = {"name": name, "grid": {"method.growth_rate": [2, 4]}, **fields}
    return SweepDirectory.create(workspace, f"{name}-0", spec, meta={"sweep": name}, directory=workspace / "sweeps")


def make_trial(sweep: SweepDirectory, number: int, rate: int) -> RunDirectory:
    meta = {"sweep": sweep.spec["name"], "parent_run_dir": f"../../sweeps/{sweep.path.name}"}
    spec = make_spec(seed=rate, num_rounds=3, growth_rate=rate)
    run = make_run(
        sweep.workspace,
        f"{sweep.path.name}-{number:03d}",
        spec=spec,
        meta={**meta, "overrides": {"method.growth_rate": rate}},
    )
    (run.path / "figures").mkdir()  # drawn already
    return run


def write(sweep: SweepDirectory, rows: Rows, *, over: bool = True) -> None:
    """The sweep's table (growth rate, run, accuracy; None while it runs), and its result where it is over."""
    sweep.write_trials(
        {
            "trial": number,
            "run_id": run.path.name,
            "run_dir": run.path,
            "status": "running" if accuracy is None else "finished",
            "eval_accuracy": accuracy,
            "overrides": {"method.growth_rate": rate},
        }
        for number, (rate, run, accuracy) in enumerate(rows)
    )
    if over:
        sweep.write_result({"status": "finished", "metrics": {}})


def children(workspace: Path, parent_id: str) -> dict[str, Any]:
    """fleetune's run id -> the child that stands under a parent; fails where one stands there twice."""
    client = make_client(default_uri(workspace))
    experiment_id = client.get_run(parent_id).info.experiment_id
    found = client.search_runs([experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent_id}'")
    by_id = {run.data.tags["fleetune_run_id"]: run for run in found}
    assert len(by_id) == len(found)
    return by_id


def best_of(found: dict[str, Any]) -> list[str]:
    return [run_id for run_id, run in found.items() if run.data.tags.get("best") == "true"]


def test_two_sweeps_that_share_trials_have_all_of_them_each(workspace: Path):
    """Growth rates 2 and 4, then 4 and 8, then 4 and a run by itself. Sent again, also without our notes, nothing is added."""
    first, second, third = (make_sweep(workspace, name) for name in ("first", "second", "third"))
    two, four, eight = make_trial(first, 0, 2), make_trial(first, 1, 4), make_trial(second, 1, 8)
    alone = make_run(workspace, "alone", spec=make_spec(seed=9, num_rounds=3))
    write(first, [(2, two, 0.5), (4, four, 0.75)])
    write(second, [(4, four, 0.75), (8, eight, 0.25)])
    write(third, [(4, four, 0.75), (2, alone, 0.8)])
    uri = default_uri(workspace)
    expected = {
        first: ([two.run_id, four.run_id], four.run_id),
        second: ([four.run_id, eight.run_id], four.run_id),
        third: ([four.run_id, "alone"], "alone"),
    }
    reports = {sweep: sync(sweep.path) for sweep in expected}
    for is_repeated in (False, True):
        for sweep, (run_ids, best) in expected.items():
            found = children(workspace, reports[sweep].mlflow_run_id)
            assert sorted(found) == sorted(run_ids)
            assert best_of(found) == [best]
            assert all(run.info.status == "FINISHED" for run in found.values())
            assert steps(uri, found[four.run_id].info.run_id) == expected_steps(four)
            assert all(run.data.tags["sweep"] == sweep.spec["name"] for run in found.values())
        copy = children(workspace, reports[third].mlflow_run_id)["alone"]
        assert (copy.data.tags["reused_from"], copy.data.params["seed"]) == ("alone", "9")
        assert copy.info.run_name == "devft · growth_rate 2 · seed 9"
        if not is_repeated:
            shutil.rmtree(third.path / "checkpoint" / "reused")
            (second.path / "checkpoint" / "mlflow.json").unlink()
            again = [sync(sweep.path) for sweep in expected]
            assert [(r.num_metrics, r.num_params, r.num_artifacts) for r in (again[0], again[2])] == [(0, 0, 0)] * 2
            assert [r.mlflow_run_id for r in again] == [r.mlflow_run_id for r in reports.values()]
    original = sync(four.path)
    assert original.mlflow_run_id == children(workspace, reports[first].mlflow_run_id)[four.run_id].info.run_id


def test_the_best_tag_follows_the_trials_as_they_end(workspace: Path):
    """By the sweep's metric and its direction: losses should be low. The first of equals stays; one that runs counts not yet."""
    sweep = make_sweep(workspace, "best")
    a, b, c = (make_trial(sweep, number, rate) for number, rate in enumerate((2, 4, 8)))
    tracker = SweepTracker(sweep, live=True)
    found = []
    for row in ([0.5, None, None], [0.5, 0.75, None], [0.5, 0.75, 0.75]):
        write(sweep, list(zip((2, 4, 8), (a, b, c), row, strict=True)), over=False)
        parent_id = tracker.push().mlflow_run_id
        for trial in (a, b, c):
            Tracker(trial).run_id()
        found.append(best_of(children(workspace, parent_id)))
    assert found == [[a.run_id], [b.run_id], [b.run_id]]

    low = make_sweep(workspace, "low", metric="eval_loss")
    low.write_trials(
        {
            "trial": n,
            "run_id": run.path.name,
            "run_dir": run.path,
            "status": "finished",
            "eval_loss": loss,
            "overrides": {},
        }
        for n, (run, loss) in enumerate([(a, 2.0), (b, 1.0)])
    )
    assert best_of(children(workspace, sync(low.path).mlflow_run_id)) == [b.run_id]


def test_a_trial_that_broke_off_and_was_found_elsewhere_stands_there_once(workspace: Path):
    """The sweep's own half of it stays in MLflow, but under no parent."""
    sweep, other = make_sweep(workspace, "broken"), make_sweep(workspace, "other")
    own = make_trial(sweep, 0, 2)
    write(sweep, [(2, own, None)], over=False)
    sync(sweep.path)
    whole = make_trial(other, 0, 2)
    write(sweep, [(2, whole, 0.5)])
    assert list(children(workspace, sync(sweep.path).mlflow_run_id)) == [whole.run_id]


def test_a_table_that_names_runs_elsewhere_leads_nowhere(workspace: Path, tmp_path_factory: pytest.TempPathFactory):
    """A sweep from somebody else: its trials are those of its own workspace."""
    strange = make_run(tmp_path_factory.mktemp("private"), "strange", spec=make_spec(num_rounds=1))
    sweep = make_sweep(workspace, "given")
    write(sweep, [(2, strange, 0.5)])
    assert children(workspace, sync(sweep.path).mlflow_run_id) == {}
    assert not (strange.path / "checkpoint" / "mlflow.json").exists()


def verdict(word: str, text: str) -> dict[str, str]:
    return {"verdict": word, "line": f"{word}: {text}"}


def test_verdicts_on_claims_are_tags_of_the_sweep_and_follow_its_file(workspace: Path):
    """Two claims; later one of them, decided otherwise; then none. Sent again nothing changes."""
    sweep = make_sweep(workspace, "study", claims=[{"better": {"method.growth_rate": 2}}])
    write(sweep, [])
    client, found = make_client(default_uri(workspace)), []
    rounds = [
        [verdict("holds", "a"), verdict("not decided", "b")],
        [verdict("reversed", "a")],
        [verdict("reversed", "a")],
        [],
    ]
    for verdicts in rounds:
        sweep.write_verdicts(verdicts)
        parent_id = sync(sweep.path).mlflow_run_id
        run = client.get_run(parent_id)
        found.append({name: value for name, value in run.data.tags.items() if name.startswith("claim")})
        has_file = "claims.json" in [item.path for item in client.list_artifacts(parent_id)]
        assert has_file or not verdicts
        assert "claims" not in run.data.params
    assert found == [
        {"claims": "holds 1, not decided 1", "claim/01": "holds: a", "claim/02": "not decided: b"},
        {"claims": "reversed 1", "claim/01": "reversed: a"},
        {"claims": "reversed 1", "claim/01": "reversed: a"},
        {},
    ]
