"""Runs on a Ray cluster of this process, with workers that tests borrow, and the serial runs that they are held against."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray

from fleetune.engine.execution.ray_pool import RayExecutor
from fleetune.engine.execution.ray_worker import SharedInputs
from fleetune.engine.launch import backends
from fleetune.methods import METHODS
from fleetune.problem import Problem
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec
from support import runs, tiny

GPU_FRACTION = 0.25  # of a GPU that Ray counts as well, and on which nothing is computed
NUM_WORKERS = 3

MARKS = [
    pytest.mark.ray,
    # Buffers mapped from the object store; nobody writes to them (fleetune.tensors says so where pytest resets no filters).
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]
"""Of every module that starts a cluster of its own."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "devft+fedsa-lora": ("devft", {"method.aggregation": "fedsa-lora"}),
    "fedsoda nf4": ("fedsoda", {"method.quantization": "nf4", "method.adapter_bits": 4}),
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
    "clients' own models": (
        "fedsa-lora",
        {"data.held_out": 0.25, "evaluation.personal": "every", "evaluation.every": 1, "evaluation.batch_size": 8},
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
    """A case as it runs in this process."""
    return runs.run(spec_of(case))


def on(executor: RayExecutor) -> runs.MakeExecutor:
    """Hand the problem to workers that are there already."""

    def make(problem: Problem) -> RayExecutor:
        key = f"{problem.spec.model.base}/{problem.spec.model.quantization}"
        executor.prepare(key, problem.spec, type(problem.method), SharedInputs.put(problem.inputs))
        return executor

    return make


def second_round_client(case: str) -> int:
    """A client that works in round 2 and not in round 1."""
    clients = serially(case).clients
    first, second = (set(clients["client_id"][clients["round"] == r]) for r in (1, 2))
    return int(min(second - first))


class Borrowed(RayExecutor):
    """An executor over the first few of the workers that are there; successors of dead ones stay when it is gone."""

    num_borrowed = itertools.count()

    def __init__(self, workers: list[Any], num_workers: int):
        super().__init__(0, threads=1, gpus_per_worker=GPU_FRACTION)
        self.num_workers, self.workers = num_workers, workers
        self._run_number = 1000 * next(Borrowed.num_borrowed)  # no worker mistakes its run for that of another executor


@contextlib.contextmanager
def cluster(module: str, *, num_cores: int) -> Iterator[None]:
    """A cluster of one node with so many cores and a GPU, whatever this machine has. ``module``: the tests' own."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[module])  # as a method in a script or a notebook travels
    ray.init(
        num_cpus=num_cores,
        num_gpus=1,
        address="local",
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        namespace="fleetune",
    )
    try:
        yield
    finally:
        backends.shutdown()


@contextlib.contextmanager
def started_workers() -> Iterator[list[Any]]:
    """Workers for many tests: each is prepared for a run while it still holds the former. They ask for shares of a GPU."""
    executor = RayExecutor(NUM_WORKERS, threads=1, gpus_per_worker=GPU_FRACTION)
    yield executor.workers
    for worker in executor.workers:
        ray.kill(worker)


def on_ray(num_workers: int = 1) -> RunSpec:
    """A job that names Ray itself."""
    return spec_of("fedit", **{"execution.kind": "ray", "execution.workers": num_workers})


def same_adapters(a: runs.Finished, b: runs.Finished) -> None:
    """The adapters that two runs ship have the same bytes."""
    both = [sorted((run.run_dir.path / "adapter").iterdir()) for run in (a, b)]
    assert [path.name for path in both[0]] == [path.name for path in both[1]] != []
    for one, other in zip(*both, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def same_records(run_path: Path, serial: runs.Finished) -> None:
    """A run directory holds the records and the adapter of a serial run."""
    run_dir = RunDirectory.open(run_path)
    differing = ["run_id", "wall_seconds"]
    tables = ((run_dir.rounds(), serial.run_dir.rounds()), (run_dir.clients(), serial.run_dir.clients()))
    for one, other in tables:
        pd.testing.assert_frame_equal(one.drop(columns=differing), other.drop(columns=differing), check_exact=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run_path / "adapter" / name).read_bytes() == (serial.run_dir.path / "adapter" / name).read_bytes()
