"""The coordinator as an actor on a real Ray cluster: it stays for further runs, and is replaced when it dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from fleetune.engine.launch import backends
from fleetune.engine.launch import run as launch
from fleetune.errors import RunFailed
from fleetune.records.run_directory import RunDirectory
from support import ray_runs, runs
from support.commands import poisoned
from support.ray_runs import (
    on_ray,
    same_records,
    second_round_client,
    serially,
)

pytestmark = ray_runs.MARKS

NUM_CORES = 2


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_runs.cluster(__name__, num_cores=NUM_CORES):
        yield


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster above says how many there are, whatever this machine has."""
    monkeypatch.setattr(backends, "num_cores", lambda: NUM_CORES)


def coordinators() -> dict[tuple[int, int, float], Any]:
    return backends.ray_backend(None)._coordinators


@pytest.mark.usefixtures("cores")
def test_further_runs_find_the_actors_warm(tmp_path: Path):
    events: list[dict[str, Any]] = []
    first = launch.run(on_ray(), workspace=tmp_path, report=events.append)
    assert [e["kind"] for e in events] == ["start", "round", "round", "round", "end"]
    assert first.status == "finished"
    same_records(first.run_dir, serially("fedit"))
    coordinator = coordinators()[1, 1, 0.0]
    workers = ray.get(coordinator.workers.remote())

    again = launch.run(on_ray(), workspace=tmp_path)
    assert again.run_dir != first.run_dir
    assert (again.metrics, again.totals["sim_seconds"]) == (first.metrics, first.totals["sim_seconds"])
    assert coordinators() == {(1, 1, 0.0): coordinator}
    assert ray.get(coordinator.workers.remote()) == workers


@pytest.mark.usefixtures("cores")
def test_a_failed_run_names_its_client_and_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    victim = second_round_client("fedit")
    with monkeypatch.context() as patch:
        healthy = runs.problem(on_ray())
        inputs = poisoned(healthy.inputs, healthy.partition.shard(victim))
        patch.setattr(backends, "load_inputs", lambda *args, **kwargs: inputs)
        with pytest.raises(RunFailed, match=rf"^client {victim}, round 2, stage 0: IndexError"):
            launch.run(on_ray(), workspace=tmp_path)
    (run_path,) = (tmp_path / "runs").iterdir()
    run_dir = RunDirectory.open(run_path)
    result = run_dir.result()
    assert result is not None
    assert result["status"] == "failed"
    assert f"client {victim}, round 2" in result["error"]
    assert run_dir.rounds()["round"].tolist() == [1]

    assert launch.resume(run_path).status == "finished"
    same_records(run_path, serially("fedit"))


@pytest.mark.usefixtures("cores")
def test_a_coordinator_that_dies_is_replaced_and_goes_on(tmp_path: Path):
    """Killed when round 2 is on record, before which the state of round 1 is written: its workers go with it, and new ones do
    the rest, without round 1."""
    events: list[dict[str, Any]] = []

    def kill_once(event: dict[str, Any]) -> None:
        events.append(event)
        if len(events) == 3:
            ray.kill(coordinators()[1, 1, 0.0], no_restart=True)

    rounds = {"rounds.num_rounds": 6}
    on_one = {"execution.kind": "ray", "execution.workers": 1}
    result = launch.run(ray_runs.spec_of("fedit", **rounds, **on_one), workspace=tmp_path, report=kill_once)
    assert result.status == "finished"
    others = [event for event in events if event["kind"] != "round"]
    assert [event["kind"] for event in others] == ["start", "start", "end"]
    assert others[1]["round"] >= 1
    same_records(result.run_dir, runs.run(ray_runs.spec_of("fedit", **rounds)))


def test_a_coordinator_that_always_dies_ends_the_run(tmp_path: Path):
    def kill(event: dict[str, Any]) -> None:
        for coordinator in coordinators().values():
            ray.kill(coordinator, no_restart=True)

    spec = on_ray().model_copy(update={"rounds": on_ray().rounds.model_copy(update={"num_rounds": 40})})
    with pytest.raises(RunFailed, match="the coordinator died"):
        launch.run(spec, workspace=tmp_path, report=kill)
    assert coordinators() == {}


@pytest.mark.usefixtures("cores")
def test_another_number_of_workers_takes_the_place_of_the_former(tmp_path: Path):
    """One worker, then two: one more than the cluster has cores for, so the former has to go."""
    assert NUM_CORES == 2
    launch.run(on_ray(1), workspace=tmp_path)
    assert list(coordinators()) == [(1, 1, 0.0)]
    result = launch.run(on_ray(2), workspace=tmp_path)
    assert list(coordinators()) == [(2, 1, 0.0)]
    same_records(result.run_dir, serially("fedit"))
