"""The coordinator as a Ray actor: it lives beside the process that started the run, and stays for further runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray

from fleetune.engine.coordinator import Coordinator, Event
from fleetune.engine.evaluation import Baselines
from fleetune.engine.execution.ray_pool import RayExecutor
from fleetune.engine.execution.ray_worker import PackedJob, SharedInputs
from fleetune.problem import build_problem, set_threads
from fleetune.records.run_directory import RunDirectory


@ray.remote(num_cpus=0, max_restarts=0)
class RayCoordinator:
    """The coordinator of runs on this cluster, with its workers. It takes no core: it waits while workers compute.

    Ray does not restart it (``max_restarts=0``), because only `RayBackend` knows which run it was at and has to go on with.
    """

    def __init__(self, num_workers: int, threads: int, gpus_per_worker: float):
        set_threads(threads)
        self.executor = RayExecutor(num_workers, threads, gpus_per_worker)
        self.baselines: Baselines = {}

    def workers(self) -> list[Any]:
        """Handles of the worker actors."""
        return self.executor.workers

    def run(self, base_key: str, job: PackedJob, shared: SharedInputs, run_path: str) -> Iterator[Event]:
        """Run a run directory, or go on with it; yields the coordinator's events."""
        spec, _ = job.unpack()
        problem = build_problem(spec, shared.get())
        self.executor.prepare(base_key, spec, type(problem.method), shared)
        run_dir = RunDirectory.open(run_path)
        yield from Coordinator(problem, self.executor, run_dir, baselines=self.baselines).run()
