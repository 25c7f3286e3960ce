"""Backends: a run's work is done in this process, or on a Ray cluster that stays for further runs of the process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import ray

from fleetune.engine.checkpoint.checkpoint import saved_rounds
from fleetune.engine.coordinator import Coordinator, Event
from fleetune.engine.execution.executor import SerialExecutor
from fleetune.engine.launch import cluster
from fleetune.engine.launch.cluster import num_cores
from fleetune.engine.launch.resolve import gpu_fraction, num_gpus, resolve_execution
from fleetune.errors import RunFailed, UserError
from fleetune.models.load import base_content
from fleetune.problem import Inputs, Problem, load_inputs, set_threads
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec
from fleetune.spec.run_config import ExecutionConfig

STOP_SECONDS = 3.0  # assumed: writing a state takes hundredths of a second, and whoever stops a run waits ten at most


class LocalBackend:
    """Runs problems in this process, one worker, nothing shared."""

    kind = "serial"

    def __init__(self, *, debug: bool = False):
        self.debug = debug

    def placed(self, spec: RunSpec) -> RunSpec:
        """The spec with the kind of this backend, which is another than it asks for with ``--debug`` or ``--address``."""
        return spec.model_copy(update={"execution": spec.execution.model_copy(update={"kind": self.kind})})

    def resolve(self, spec: RunSpec) -> RunSpec:
        """The spec with every ``auto`` decided."""
        return resolve_execution(spec, node_cores=[num_cores()], node_gpus=[num_gpus()])

    def inputs(self, spec: RunSpec) -> Inputs:
        """Model and data of a run."""
        return load_inputs(spec)

    def events(self, problem: Problem, run_dir: RunDirectory) -> Generator[Event, None, None]:
        """Run the problem; yields the coordinator's events."""
        set_threads(int(problem.spec.execution.threads))
        yield from Coordinator(problem, SerialExecutor(problem, debug=self.debug), run_dir).run()


class RayBackend(LocalBackend):
    """A Ray cluster, with a coordinator and workers that stay for the next run of this process."""

    kind = "ray"

    def __init__(self, address: str | None):
        super().__init__()
        self.address = address
        self.cluster = cluster.join(address)  # meanwhile model and data are read and checked
        # (workers, threads, GPUs of a worker) -> actor; at most one, as two would want the same cores.
        self._coordinators: dict[tuple[int, int, float], Any] = {}
        self._starting = threading.Lock()  # `inputs` starts workers in a thread, and `events` must not start them again
        # `base_key` -> (base model, reference of its arrays). The object store has them as long as a reference is here.
        self._bases: dict[str, tuple[Any, Any]] = {}

    def resolve(self, spec: RunSpec) -> RunSpec:
        """The spec with every ``auto`` decided, by the cores and GPUs of the cluster's nodes."""
        if self.address is None:  # its only node is this machine, so the answer need not wait for Ray to start
            return super().resolve(spec)
        self.cluster.wait()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and int(node["Resources"].get("CPU", 0))]
        return resolve_execution(
            spec,
            node_cores=[int(node["CPU"]) for node in nodes] or [1],
            node_gpus=[int(node.get("GPU", 0)) for node in nodes] or None,
        )

    def inputs(self, spec: RunSpec) -> Inputs:
        """Model and data, while Ray and the workers start; a base model that is in the object store is not read again."""
        if not self._coordinators:
            threading.Thread(target=self._start_workers, args=(spec.execution,), daemon=True).start()
        base, _ = self._bases.get(base_key(spec), (None, None))
        if base is not None and base.content != base_content(base.folder):  # its files have changed since the last run
            base = None
        return load_inputs(spec, base=base)

    def events(self, problem: Problem, run_dir: RunDirectory) -> Generator[Event, None, None]:
        """Hand the run to the coordinator actor and pass on its events.

        What can go wrong: this process is stopped (`_stop`), the run fails (its own error is raised), the coordinator dies.
        """
        from fleetune.engine.execution.ray_worker import PackedJob, SharedInputs

        self.cluster.wait()
        execution = problem.spec.execution
        base = problem.inputs.base
        former, former_ref = self._bases.get(base_key(problem.spec), (None, None))
        is_stored = former is not None and former.key == base.key
        shared = SharedInputs.put(problem.inputs, base=former_ref if is_stored else None)
        self._bases[base_key(problem.spec)] = (base, shared.base)
        call = (base.key, PackedJob.of(problem.spec, type(problem.method)), shared, str(run_dir.path))
        # A coordinator that dies is replaced once; the new one goes on after the last round whose state is written. So the events
        # of rounds in between come twice, and begin with a second start event.
        for is_last in (False, True):
            coordinator = self._coordinator(execution)
            stream = coordinator.run.options(num_returns="streaming").remote(*call)
            num_rounds = 0
            try:
                for ref in stream:
                    event = ray.get(ref)
                    num_rounds = event["round"]
                    yield event
                return
            except (KeyboardInterrupt, GeneratorExit):
                self._stop(coordinator, run_dir, num_rounds)
                raise
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except ray.exceptions.RayActorError as error:
                self._coordinators.clear()  # the handle of a dead actor; its workers, which it owned, end with it
                if is_last:
                    raise RunFailed(f"the coordinator died: {' '.join(str(error).split())}") from error

    def _stop(self, coordinator: Any, run_dir: RunDirectory, num_rounds: int) -> None:
        """End a run that nobody waits for, once the state after the rounds that were reported is written.

        A state is written beside the next round. If the coordinator were killed at once, the last round that the user saw might
        have to be worked out again.
        """
        deadline = time.monotonic() + STOP_SECONDS
        while saved_rounds(run_dir.path / "checkpoint") < num_rounds and time.monotonic() < deadline:
            time.sleep(0.02)
        self._coordinators.clear()
        ray.kill(coordinator)

    def _start_workers(self, execution: ExecutionConfig) -> None:
        """If the cluster cannot be joined, nothing is said here: `events` raises it in the main thread."""
        if self.cluster.is_up():
            self._coordinator(execution)

    def _coordinator(self, execution: ExecutionConfig) -> Any:
        with self._starting:
            return self._find_coordinator(int(execution.workers), int(execution.threads), gpu_fraction(execution))

    def _find_coordinator(self, num_workers: int, threads: int, gpus_per_worker: float) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from fleetune.engine.launch.ray_coordinator import RayCoordinator

        key = (num_workers, threads, gpus_per_worker)
        if key not in self._coordinators:
            for other in self._coordinators.values():  # its workers' cores and GPUs are needed
                ray.kill(other)
            self._coordinators.clear()
            # On this node, because it writes the run directory, which this process made. Soft: if this node takes no actors,
            # Ray may choose another that shares the folder.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            options = RayCoordinator.options(scheduling_strategy=here)  # type: ignore[attr-defined]
            self._coordinators[key] = options.remote(*key)
        return self._coordinators[key]


_backends: dict[str | None, RayBackend] = {}


@contextlib.contextmanager
def backend_for(spec: RunSpec, *, address: str | None, debug: bool) -> Iterator[LocalBackend]:
    """The backend that a spec asks for. A Ray backend stays for the next run of this process."""
    here = LocalBackend(debug=debug)
    if debug or (address is None and here.resolve(spec).execution.kind == "serial"):
        yield here
        return
    try:
        yield ray_backend(address)
    except UserError:
        # A mistake in the job leaves the cluster as it is. A cluster that could not be joined is tried anew by the next run.
        if not _backends[address].cluster.is_up():
            del _backends[address]
            cluster.forget(address)
        raise


def ray_backend(address: str | None) -> RayBackend:
    """This process's backend on a cluster; it joins in the background."""
    if address not in _backends:
        _backends[address] = RayBackend(address)
    return _backends[address]


def shutdown() -> None:
    """Forget this process's backends and clusters and disconnect from Ray; a further run starts or joins a cluster anew."""
    _backends.clear()
    cluster.forget_all()
    ray.shutdown()


def base_key(spec: RunSpec) -> str:
    """The base model as a spec names it. Two of one name may differ in content, which `BaseModel.key` tells apart."""
    return f"{spec.model.base}/{spec.model.quantization}"
