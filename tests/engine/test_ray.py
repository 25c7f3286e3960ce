"""Runs on a real Ray cluster of this machine: the same bits as serially, on any number of workers, and whoever dies."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray

from fleetune.engine.execution.executor import SerialExecutor
from fleetune.engine.execution.ray_pool import RayExecutor
from fleetune.engine.execution.ray_worker import SharedInputs
from fleetune.engine.execution.work_units import WorkUnit, WorkUnitReply
from fleetune.engine.launch import backends
from fleetune.engine.launch import run as launch
from fleetune.engine.launch.cluster import Cluster
from fleetune.errors import RunFailed, UserError
from fleetune.methods import METHODS
from fleetune.methods.base import Payload
from fleetune.methods.fedavg import FedIT
from fleetune.problem import Problem
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec
from support import runs, tiny
from support.commands import poisoned

pytestmark = [
    pytest.mark.ray,
    # Buffers mapped from the object store; nobody writes to them (fleetune.tensors says so where pytest resets no filters).
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]

GPU_FRACTION = 0.25  # of a GPU that Ray counts as well, and on which nothing is computed
NUM_CORES = 5  # those that Ray counts, not those of this machine: three workers, and two of a coordinator

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "devft+fedsa-lora": ("devft", {"method.aggregation": "fedsa-lora"}),
    "split-lora in_turn": ("split-lora", {"method.server": "in_turn"}),
    "split-lora per_client": ("split-lora", {"method.server": "per_client"}),
    "clients leave and come late": (
        "fedsa-lora",
        {"fleet.dropout": 0.3, "rounds.close": "first_k", "rounds.first_k": 2},
    ),
    "ranks adapt, clients come and go": (
        "fedsa-lora",
        {
            "fleet.adapt": "rank",
            "fleet.budgets.bytes_per_round": {"jetson-nano": 10_000},  # 7,680 at rank 1, both ways
            "fleet.availability": {"kind": "markov", "mean_on_seconds": 10.0, "mean_off_seconds": 5.0},
        },
    ),
    "submodels adapt": (
        "devft",
        {"fleet.adapt": "capacity", "fleet.budgets.bytes_per_round": {"jetson-nano": 8000}},  # 7,936 for one block
    ),
    "bf16": ("fedit", {"execution.precision": "bf16", "evaluation.generate": True}),
    "generated answers": ("fedit", {"evaluation.generate": True, "evaluation.batch_size": 3, "evaluation.every": 1}),
}


def spec_of(case: str, **overrides: Any) -> RunSpec:
    """Cohorts of one, so that a round of three clients has three units to hand out."""
    method, variant = CASES[case]
    return tiny.spec({"evaluation.generate": False, "execution.cohort": 1, **variant, **overrides}, method=method)


@functools.cache
def serially(case: str) -> runs.Finished:
    return runs.run(spec_of(case))


def on(executor: RayExecutor) -> runs.MakeExecutor:
    """Hand the problem to workers that are there already."""

    def make(problem: Problem) -> RayExecutor:
        key = f"{problem.spec.model.base}/{problem.spec.model.quantization}"
        executor.prepare(key, problem.spec, type(problem.method), SharedInputs.put(problem.inputs))
        return executor

    return make


def same_adapters(a: runs.Finished, b: runs.Finished) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        both = [(run.run_dir.path / "adapter" / name).read_bytes() for run in (a, b)]
        assert both[0] == both[1], name


def second_round_client(case: str) -> int:
    """A client that works in round 1 and not in round 0."""
    clients = serially(case).clients
    first, second = (set(clients["client_id"][clients["round"] == r]) for r in (0, 1))
    return int(min(second - first))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as a method in a script or a notebook travels
    ray.init(
        num_cpus=NUM_CORES,
        num_gpus=1,  # likewise
        address="local",
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        namespace="fleetune",
    )
    yield
    backends.shutdown()


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Any]]:
    """Three workers for all tests: each is prepared for a run while it still holds the former. They ask for shares of a GPU."""
    executor = RayExecutor(3, threads=1, gpus_per_worker=GPU_FRACTION)
    yield executor.workers
    for worker in executor.workers:
        ray.kill(worker)


class Borrowed(RayExecutor):
    """An executor over the first few of the workers that are there; successors of dead ones stay when it is gone."""

    num_borrowed = itertools.count()

    def __init__(self, workers: list[Any], num_workers: int):
        super().__init__(0, threads=1, gpus_per_worker=GPU_FRACTION)
        self.num_workers, self.workers = num_workers, workers
        self._run_number = 1000 * next(Borrowed.num_borrowed)  # no worker mistakes its run for that of another executor


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_workers_gives_the_bits_of_a_serial_run(workers: list[Any], case: str, num_workers: int):
    run = runs.run(spec_of(case), on(Borrowed(workers, num_workers)))
    runs.same_runs(run, serially(case))
    same_adapters(run, serially(case))


class Apart(Borrowed):
    """Workers on a machine that does not have the run's folder."""

    def run(self, units: Sequence[WorkUnit], payloads: Mapping[int, Payload]) -> Iterator[WorkUnitReply]:
        return super().run([replace(unit, store=replace(unit.store, token="elsewhere")) for unit in units], payloads)


def test_what_clients_keep_travels_where_it_cannot_be_shared(workers: list[Any]):
    run = runs.run(spec_of("fedsa-lora"), on(Apart(workers, 2)))
    runs.same_runs(run, serially("fedsa-lora"))


def test_hosts_share_the_gpu_that_ray_gives_them(workers: list[Any]):
    """Three workers with a quarter each: all see GPU 0 and no other, and a quarter of it is left."""

    def sees(_: Any) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert ray.get([worker.__ray_call__.remote(sees) for worker in workers]) == ["0", "0", "0"]
    assert ray.available_resources()["GPU"] == pytest.approx(1 - 3 * GPU_FRACTION)


def test_a_cluster_s_gpus_are_found(monkeypatch: pytest.MonkeyPatch):
    """One node of five cores with one GPU, as Ray counts them, whatever this machine has."""
    monkeypatch.setattr(Cluster, "_connect", lambda joining: joining._ready.set())
    engine = backends.RayBackend("auto")

    def chosen(**execution: Any) -> Any:
        return engine.resolve(tiny.spec({"execution": execution})).execution

    alone = chosen()
    assert (alone.device, alone.workers, alone.threads) == ("cuda", 1, NUM_CORES)
    shared = chosen(workers_per_gpu=2)
    assert (shared.device, shared.workers, shared.threads) == ("cuda", 2, 2)
    with pytest.raises(UserError, match="3 workers need more than the 1 GPU"):
        chosen(device="cuda", workers=3, workers_per_gpu=2)


# -- workers that die ---------------------------------------------------------------------------------------------------
@pytest.fixture
def pair(workers: list[Any]) -> RayExecutor:
    return Borrowed(workers, 2)


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
    """WorkUnit 4 is the second of round 1: one of two workers dies with it, and its successor carries it out."""
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
    with pytest.raises(RunFailed, match=r"^client \d, round 1, stage 0: the worker process died") as failure:
        runs.run(spec_of("fedit"), on(pool))
    workers[:1] = pool.unwatched
    assert len(pool.killed) >= pool.max_deaths
    assert failure.value.round_idx == 1
    assert len(failure.value.client_ids) == 1


# -- work that fails --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["serial", "ray"])
def test_a_failing_client_is_named(place: str, pair: RayExecutor, monkeypatch: pytest.MonkeyPatch):
    """One client's examples hold a token beyond the vocabulary. It trains with two others that are healthy."""
    spec = spec_of("fedit", **{"execution.cohort": 3})
    victim = second_round_client("fedit")
    healthy = runs.problem(spec)
    inputs = poisoned(healthy.inputs, healthy.partition.shard(victim))
    monkeypatch.setattr(runs, "inputs", lambda _: inputs)
    with pytest.raises(
        RunFailed, match=rf"^client {victim}, round 1, stage 0: IndexError: index out of range"
    ) as failure:
        runs.run(spec, on(pair) if place == "ray" else SerialExecutor)
    assert (failure.value.client_ids, failure.value.round_idx, failure.value.stage) == ((victim,), 1, 0)


class FailsOnce(FedIT):
    """Fails the first time that a process works on it."""

    failed = False

    def local_update(self, *args: Any, **kwargs: Any) -> Any:
        """Work, from the second time on."""
        if not FailsOnce.failed:
            FailsOnce.failed = True
            raise OSError("a passing trouble")
        return super().local_update(*args, **kwargs)


class Diverges(FedIT):
    """The client with the largest number of every cohort of two or more learns at a rate that no adapter survives."""

    def local_update(self, worker: Any, payload: Any, tasks: Any) -> Any:
        """Work, at that rate."""
        last = max(task.client_id for task in tasks) if len(tasks) > 1 else -1
        hot = [replace(task, learning_rate=1e30) if task.client_id == last else task for task in tasks]
        return super().local_update(worker, payload, hot)


def test_a_diverging_client_is_left_out_alike_on_any_host(pair: RayExecutor, monkeypatch: pytest.MonkeyPatch):
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
    monkeypatch.setattr(runs, "inputs", lambda _: replace(healthy, evaluation=broken))
    with pytest.raises(RunFailed, match=r"^evaluation: IndexError: index out of range"):
        runs.run(spec, on(pair) if place == "ray" else SerialExecutor)


# -- the coordinator as an actor ----------------------------------------------------------------------------------------
@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster above says how many there are, whatever this machine has."""
    monkeypatch.setattr(backends, "num_cores", lambda: NUM_CORES)


def on_ray(num_workers: int = 1) -> RunSpec:
    return spec_of("fedit", **{"execution.kind": "ray", "execution.workers": num_workers})


def same_records(run_path: Path, whole: runs.Finished) -> None:
    run_dir = RunDirectory.open(run_path)
    for mine, theirs in ((run_dir.rounds(), whole.run_dir.rounds()), (run_dir.clients(), whole.run_dir.clients())):
        told = ["run_id", "wall_seconds"]
        pd.testing.assert_frame_equal(mine.drop(columns=told), theirs.drop(columns=told), check_exact=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run_path / "adapter" / name).read_bytes() == (whole.run_dir.path / "adapter" / name).read_bytes()


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
        with pytest.raises(RunFailed, match=rf"^client {victim}, round 1, stage 0: IndexError"):
            launch.run(on_ray(), workspace=tmp_path)
    (run_path,) = (tmp_path / "runs").iterdir()
    run_dir = RunDirectory.open(run_path)
    result = run_dir.result()
    assert result is not None
    assert result["status"] == "failed"
    assert f"client {victim}, round 1" in result["error"]
    assert run_dir.rounds()["round"].tolist() == [0]

    assert launch.resume(run_path).status == "finished"
    same_records(run_path, serially("fedit"))


@pytest.mark.usefixtures("cores")
def test_a_coordinator_that_dies_is_replaced_and_goes_on(tmp_path: Path):
    """Killed after round 0 (and however much of round 1): its workers go with it, and new ones do the rest."""
    events: list[dict[str, Any]] = []

    def kill_once(event: dict[str, Any]) -> None:
        events.append(event)
        if len(events) == 2:
            ray.kill(coordinators()[1, 1, 0.0], no_restart=True)

    result = launch.run(on_ray(), workspace=tmp_path, report=kill_once)
    assert result.status == "finished"
    assert [e["kind"] for e in events if e["kind"] != "round"] == ["start", "start", "end"]
    assert events[2]["round"] >= 1
    same_records(result.run_dir, serially("fedit"))


def test_a_coordinator_that_always_dies_ends_the_run(tmp_path: Path):
    def kill(event: dict[str, Any]) -> None:
        for coordinator in coordinators().values():
            ray.kill(coordinator, no_restart=True)

    spec = on_ray().model_copy(update={"rounds": on_ray().rounds.model_copy(update={"num_rounds": 40})})
    with pytest.raises(RunFailed, match="the coordinator died"):
        launch.run(spec, workspace=tmp_path, report=kill)
    assert coordinators() == {}


@pytest.mark.usefixtures("cores")
def test_another_number_of_workers_takes_the_place_of_the_former(workers: list[Any], tmp_path: Path):
    """Three workers of the tests above, then 1 + 2: one more than the cluster has cores for, so the former has to go."""
    assert len(workers) + 1 + 2 == NUM_CORES + 1
    launch.run(on_ray(1), workspace=tmp_path)
    assert list(coordinators()) == [(1, 1, 0.0)]
    result = launch.run(on_ray(2), workspace=tmp_path)
    assert list(coordinators()) == [(2, 1, 0.0)]
    same_records(result.run_dir, serially("fedit"))
