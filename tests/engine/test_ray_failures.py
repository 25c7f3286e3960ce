"""Failures on Ray: workers that die change nothing, and work that fails is tried once more, then named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from fleetune.engine.execution.executor import SerialExecutor
from fleetune.engine.execution.ray_pool import RayExecutor
from fleetune.errors import RunFailed
from fleetune.methods import METHODS
from fleetune.methods.fedavg import FedIT
from support import ray_runs, runs
from support.commands import poisoned
from support.ray_runs import (
    NUM_WORKERS,
    Borrowed,
    on,
    same_adapters,
    second_round_client,
    serially,
    spec_of,
    started_workers,
)

pytestmark = ray_runs.MARKS


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_runs.cluster(__name__, num_cores=NUM_WORKERS):
        yield


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Any]]:
    with started_workers() as handles:
        yield handles


@pytest.fixture
def pair(workers: list[Any]) -> RayExecutor:
    return Borrowed(workers, 2)


# -- workers that die ---------------------------------------------------------------------------------------------------
class Dying(Borrowed):
    """Workers die right after they were handed one of these units, counted from 0 over the whole run."""

    max_deaths = 2

    def __init__(self, workers: list[Any], dies_at: range):
        super().__init__([Watched(worker, self) for worker in workers], len(workers))
        self.dies_at = dies_at
        self.num_calls = 0
        self.killed: list[Any] = []

    def _new_worker(self) -> Any:
        return Watched(super()._new_worker(), self)

    @property
    def unwatched(self) -> list[Any]:
        """The workers as they are now."""
        return [watched.worker for watched in self.workers]


class Watched:
    """A worker's handle that counts the units it is handed."""

    def __init__(self, worker: Any, pool: Dying):
        self.worker, self.pool = worker, pool
        self.prepare, self.evaluate, self.run = worker.prepare, worker.evaluate, self

    def remote(self, *args: Any) -> Any:
        ref = self.worker.run.remote(*args)
        if self.pool.num_calls in self.pool.dies_at:
            self.pool.killed.append(self.worker)
            ray.kill(self.worker, no_restart=True)
        self.pool.num_calls += 1
        return ref


def test_a_worker_that_is_killed_changes_nothing(workers: list[Any]):
    """WorkUnit 4 is the second of round 2: one of two workers dies with it, and its successor carries it out."""
    pool = Dying(workers[:2], range(4, 5))
    run = runs.run(spec_of("fedsa-lora"), on(pool))
    workers[:2] = pool.unwatched
    assert len(pool.killed) == 1
    assert pool.killed[0] not in workers
    assert pool.num_calls > 9  # three rounds of three units, and those that the worker took with it
    runs.same_runs(run, serially("fedsa-lora"))
    same_adapters(run, serially("fedsa-lora"))


def test_a_worker_that_died_between_two_runs_is_replaced(workers: list[Any], pair: RayExecutor):
    before = list(workers)
    ray.kill(workers[1], no_restart=True)
    runs.same_runs(runs.run(spec_of("fedit"), on(pair)), serially("fedit"))
    assert workers[0] is before[0]
    assert workers[1] is not before[1]


def test_work_that_always_kills_its_worker_ends_the_run(workers: list[Any]):
    """A crash in native code, or a client too big for the machine: it is given another worker, then it is named."""
    pool = Dying(workers[:1], range(3, 99))
    with pytest.raises(RunFailed, match=r"^client \d, round 2, stage 0: the worker process died") as failure:
        runs.run(spec_of("fedit"), on(pool))
    workers[:1] = pool.unwatched
    assert len(pool.killed) >= pool.max_deaths
    assert failure.value.round_idx == 1
    assert len(failure.value.client_ids) == 1


# -- work that fails ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["serial", "ray"])
def test_a_failing_client_is_named(place: str, pair: RayExecutor, monkeypatch: pytest.MonkeyPatch):
    """One client's examples hold a token beyond the vocabulary. It trains with two others that are healthy."""
    spec = spec_of("fedit", **{"execution.cohort": 3})
    victim = second_round_client("fedit")
    healthy = runs.problem(spec)
    inputs = poisoned(healthy.inputs, healthy.partition.shard(victim))
    monkeypatch.setattr("fleetune.check.runs.inputs", lambda _: inputs)
    with pytest.raises(
        RunFailed, match=rf"^client {victim}, round 2, stage 0: IndexError: index out of range"
    ) as failure:
        runs.run(spec, on(pair) if place == "ray" else SerialExecutor)
    assert (failure.value.client_ids, failure.value.round_idx, failure.value.stage) == ((victim,), 1, 0)


class FailsOnce(FedIT):
    """Fails the first time that a process works on it, though not while costs are traced, where a failure ends the run."""

    failed = False

    def local_update(self, worker: Any, payload: Any, tasks: Any) -> Any:
        """Work, from the second time on."""
        is_traced = any(tensor.is_meta for tensor in payload.tensors.values())
        if not FailsOnce.failed and not is_traced:
            FailsOnce.failed = True
            raise OSError("a passing trouble")
        return super().local_update(worker, payload, tasks)


class Diverges(FedIT):
    """The client with the largest number of every cohort of two or more learns at a rate that no adapter survives."""

    def local_update(self, worker: Any, payload: Any, tasks: Any) -> Any:
        """Work, at that rate."""
        last = max(task.client_id for task in tasks) if len(tasks) > 1 else -1
        hot = [replace(task, learning_rate=1e30) if task.client_id == last else task for task in tasks]
        return super().local_update(worker, payload, hot)


def test_a_diverging_client_is_left_out_the_same_on_any_worker(pair: RayExecutor, monkeypatch: pytest.MonkeyPatch):
    """Of three in a cohort one fails, of the other two one again, and the last is left: nothing depends on where."""
    monkeypatch.setitem(METHODS, "fedit", Diverges)
    spec = spec_of("fedit", **{"local.max_grad_norm": None, "execution.cohort": 3})
    run, serial = (runs.run(spec, make) for make in (on(pair), SerialExecutor))
    assert run.rounds["num_failed"].tolist() == [2, 2, 2]
    runs.same_runs(run, serial)


class Unpreparable(FedIT):
    """Cannot be made on a worker."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
            raise OSError("no room on this worker")


@pytest.mark.parametrize("place", ["serial", "ray"])
def test_a_passing_trouble_is_cured_by_a_second_try(place: str, pair: RayExecutor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "fedit", FailsOnce)
    FailsOnce.failed = False
    run = runs.run(spec_of("fedit"), on(pair) if place == "ray" else SerialExecutor)
    assert type(run.problem.method) is FailsOnce
    runs.same_runs(run, serially("fedit"))


def test_a_worker_that_cannot_take_up_the_run_says_why(pair: RayExecutor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "fedit", Unpreparable)
    with pytest.raises(RunFailed, match="OSError: no room on this worker"):
        runs.run(spec_of("fedit"), on(pair))


@pytest.mark.parametrize("place", ["serial", "ray"])
def test_a_failing_evaluation_is_told(place: str, pair: RayExecutor, monkeypatch: pytest.MonkeyPatch):
    spec = spec_of("fedit")
    healthy = runs.inputs(spec)
    data = healthy.evaluation.data
    broken = replace(healthy.evaluation, data=replace(data, tokens=data.tokens + 10**6))
    monkeypatch.setattr("fleetune.check.runs.inputs", lambda _: replace(healthy, evaluation=broken))
    with pytest.raises(RunFailed, match=r"^evaluation: IndexError: index out of range"):
        runs.run(spec, on(pair) if place == "ray" else SerialExecutor)
