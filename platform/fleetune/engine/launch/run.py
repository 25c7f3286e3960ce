"""From a spec to a finished run: checks, Ray or not, the run directory, MLflow, and going on after a kill."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from fleetune import files
from fleetune.content import check_content
from fleetune.engine.checkpoint.checkpoint import saved_rounds
from fleetune.engine.coordinator import Coordinator, Event
from fleetune.engine.divergence import Notices
from fleetune.engine.execution.executor import SerialExecutor
from fleetune.engine.launch import cluster
from fleetune.engine.launch.cluster import num_cores
from fleetune.engine.launch.directories import locked, new_run_directory
from fleetune.engine.launch.resolve import gpu_share, num_gpus, resolve_execution
from fleetune.errors import RunFailed, Stopped, UserError
from fleetune.models.load import base_content
from fleetune.problem import Inputs, Problem, build_problem, load_inputs, set_threads
from fleetune.records.run_directory import RunDirectory
from fleetune.records.timeline import write_timeline
from fleetune.run_config import ExecutionConfig
from fleetune.spec import RunSpec, from_dict
from fleetune.tracking.access import check_access
from fleetune.tracking.stream import RecordStream

if TYPE_CHECKING:
    from fleetune.engine.launch.ray_coordinator import RayCoordinator  # noqa: F401

Report = Callable[[Event], None]
STOP_SECONDS = 3.0  # assumed: writing a state takes hundredths, and whoever stops a run wants it gone within ten
SYNC_SECONDS = 60.0  # how long to wait for a run's last records to arrive in MLflow
QUIET_SECONDS = 3.0  # before it is said that something is waited for


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run_id: str
    run_dir: Path
    status: str
    metrics: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    synced: bool | None = None
    """Whether MLflow holds all of it; None where that was not asked."""

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it; ``synced`` only where it is false."""
        return {**told(vars(self)), "run_dir": str(self.run_dir)}


def told(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A result's fields, without ``synced`` where there is nothing to be done about it."""
    return {name: value for name, value in fields.items() if name != "synced" or value is False}


def run(
    spec: RunSpec,
    *,
    workspace: Path,
    address: str | None = None,
    debug: bool = False,
    report: Report | None = None,
    warn: Callable[[str], None] | None = None,
    meta: dict[str, Any] | None = None,
) -> Result:
    """Check everything, then run. UserError before any actor starts; RunFailed leaves a directory that can be resumed."""
    _check_tracking(spec)
    with backend_for(spec, address=address, debug=debug) as backend:
        spec = backend.placed(backend.resolve(spec))
        problem = build_problem(spec, backend.inputs(spec))
        if warn is not None:
            for note in problem.fleet.rate_notes(spec.cost.precision):
                warn(note)
        run_dir = new_run_directory(spec, problem, workspace, meta or {})
        return _execute(backend, problem, run_dir, report=report, warn=warn)


def resume(
    path: Path,
    *,
    address: str | None = None,
    debug: bool = False,
    report: Report | None = None,
    warn: Callable[[str], None] | None = None,
) -> Result:
    """Go on after the last finished round, bit for bit as if nothing had happened."""
    run_dir = RunDirectory.open(path)
    try:
        spec = from_dict(run_dir.spec)
    except files.Damaged:
        raise
    except UserError as error:
        raise files.damaged(run_dir.path / RunDirectory.SPEC, error, holds="what was run") from None
    meta, result = run_dir.meta, run_dir.result()
    recorded = meta.get("spec_hash")
    if meta.get("content") is None:
        recorded = None  # a version that made another hash: what is finished is shown, what is not is refused below
    if recorded is not None and recorded != spec.spec_hash:
        raise UserError(
            f"its spec.yaml is not the one it was started with (hash {spec.spec_hash}, started with {recorded})",
            field="RUN_DIR",
            value=str(path),
            hint="restore spec.yaml, or start a new run from the job file",
        )
    if result is not None and result.get("status") == "finished":
        run_dir.check()
        return Result(run_dir.run_id, run_dir.path, "finished", result.get("metrics", {}), result.get("totals", {}))
    _check_tracking(spec)
    with backend_for(spec, address=address, debug=debug) as backend:
        spec = backend.placed(
            backend.resolve(spec)
        )  # nothing is left to decide, but there may be fewer cores or GPUs here
        inputs = backend.inputs(spec)
        check_content(spec, meta.get("content"), inputs.content, run=str(path))
        return _execute(backend, build_problem(spec, inputs), run_dir, report=report, warn=warn)


def _execute(
    backend: LocalBackend,
    problem: Problem,
    run_dir: RunDirectory,
    *,
    report: Report | None,
    warn: Callable[[str], None] | None,
) -> Result:
    tracked = problem.spec.tracking.enabled
    with locked(run_dir):
        if tracked:
            follower(warn).watch(run_dir.path)
        event: Event = {}
        notices = Notices()
        try:
            with contextlib.closing(backend.events(problem, run_dir)) as events:
                for event in events:
                    for note in (*event.get("notes", ()), *notices.of(event)):
                        if warn is not None:
                            warn(note)
                    if report is not None:
                        report(event)
            finished = finish(run_dir, event)
        except KeyboardInterrupt:
            raise Stopped(f"fleetune resume {run_dir.path}") from None
        except files.Damaged:  # as it was found
            raise
        except files.WriteFailed as error:
            conclude(run_dir, error)
            text = f"{error.filename} cannot be written: {error.strerror}"
            raise RunFailed(f"{text}; once it can, go on with fleetune resume {run_dir.path}") from error
        except BaseException as error:
            conclude(run_dir, error)
            raise
    return replace(finished, synced=in_mlflow([run_dir.path], warn)) if tracked else finished


def conclude(run_dir: RunDirectory, error: BaseException | str) -> None:
    """Write the result of a run that failed, as far as the disk has room: its parts are whole where they are, too."""
    with contextlib.suppress(files.WriteFailed, files.Damaged):
        run_dir.consolidate()
        run_dir.write_result({"status": "failed", "error": str(error), "metrics": {}, "totals": {}})


def finish(run_dir: RunDirectory, event: Event, *, status: str = "finished") -> Result:
    """Write the timeline and the result of a run whose last event this is; ``stopped``: before its last round."""
    row = event["row"]
    metrics = {name: row.get(name) for name in ("train_loss", "eval_loss", "eval_accuracy")}
    metrics.update({f"baseline_{name}": value for name, value in event["baseline"].items()})
    # JSON knows neither NaN nor infinity, and null alone would say that there was no evaluation.
    not_finite = [name for name, value in metrics.items() if value is not None and not math.isfinite(value)]
    metrics.update(dict.fromkeys(not_finite))
    totals = {"num_rounds": event["round"], "sim_seconds": event["sim_seconds"], **event["totals"]}
    write_timeline(run_dir)
    result = {"status": status, "metrics": metrics, "totals": totals}
    run_dir.write_result({**result, "not_finite": not_finite} if not_finite else result)
    return Result(run_dir.run_id, run_dir.path, status, metrics, totals)


# -- engines: where a run's work is done ----------------------------------------------------------------------------------
class LocalBackend:
    """Runs problems in this process, one worker, nothing shared."""

    kind = "serial"

    def __init__(self, *, debug: bool = False):
        self.debug = debug

    def placed(self, spec: RunSpec) -> RunSpec:
        """The spec with where this engine runs it, which may be elsewhere than it says (``--debug``, ``--address``)."""
        return spec.model_copy(update={"execution": spec.execution.model_copy(update={"kind": self.kind})})

    def resolve(self, spec: RunSpec) -> RunSpec:
        """The spec with every ``auto`` decided."""
        return resolve_execution(spec, node_cores=[num_cores()], node_gpus=[num_gpus()])

    def inputs(self, spec: RunSpec) -> Inputs:
        """Model and data of a run."""
        return load_inputs(spec)

    def events(self, problem: Problem, run_dir: RunDirectory) -> Generator[Event, None, None]:
        """Run it."""
        set_threads(int(problem.spec.execution.threads))
        yield from Coordinator(problem, SerialExecutor(problem, debug=self.debug), run_dir).run()


class RayBackend(LocalBackend):
    """A Ray cluster, with a coordinator and workers that stay for the next run of this process."""

    kind = "ray"

    def __init__(self, address: str | None):
        super().__init__()
        self.address = address
        self.cluster = cluster.join(address)  # meanwhile model and data are read and checked
        self._coordinators: dict[tuple[int, int, float], Any] = {}
        self._starting = threading.Lock()
        self._bases: dict[str, tuple[Any, Any]] = {}

    def resolve(self, spec: RunSpec) -> RunSpec:
        """Workers are chosen from the cluster's cores and GPUs."""
        if self.address is None:
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
        if base is not None and base.content != base_content(base.folder):
            base = None
        return load_inputs(spec, base=base)

    def events(self, problem: Problem, run_dir: RunDirectory) -> Generator[Event, None, None]:
        """Hand the run to the coordinator actor and pass on its events."""
        from fleetune.engine.execution.ray_worker import SharedInputs

        self.cluster.wait()
        execution = problem.spec.execution
        base = problem.inputs.base
        known, ref = self._bases.get(base_key(problem.spec), (None, None))
        shared = SharedInputs.put(problem.inputs, base=ref if known is not None and known.key == base.key else None)
        self._bases[base_key(problem.spec)] = (base, shared.base)
        call = (base.key, problem.spec, shared, str(run_dir.path))
        for is_last in (False, True):  # a coordinator that dies is replaced once, and goes on after the last round
            coordinator = self._coordinator(execution)
            stream = coordinator.run.options(num_returns="streaming").remote(*call)
            num_told = 0
            try:
                for ref in stream:
                    event = ray.get(ref)
                    num_told = event["round"]
                    yield event
                return
            except (KeyboardInterrupt, GeneratorExit):
                self._stop(coordinator, run_dir, num_told)
                raise
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except ray.exceptions.RayActorError as error:
                self._coordinators.clear()
                if is_last:
                    raise RunFailed(f"the coordinator died: {' '.join(str(error).split())}") from error

    def _stop(self, coordinator: Any, run_dir: RunDirectory, num_rounds: int) -> None:
        """End a run that nobody waits for, once the state after so many rounds is written: that goes on beside the next round."""
        deadline = time.monotonic() + STOP_SECONDS
        while saved_rounds(run_dir.path / "checkpoint") < num_rounds and time.monotonic() < deadline:
            time.sleep(0.02)
        self._coordinators.clear()
        ray.kill(coordinator)

    def _start_workers(self, execution: ExecutionConfig) -> None:
        if self.cluster.is_up():
            self._coordinator(execution)

    def _coordinator(self, execution: ExecutionConfig) -> Any:
        with self._starting:
            return self._find_coordinator(int(execution.workers), int(execution.threads), gpu_share(execution))

    def _find_coordinator(self, num_workers: int, threads: int, gpus_per_worker: float) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from fleetune.engine.launch.ray_coordinator import RayCoordinator

        key = (num_workers, threads, gpus_per_worker)
        if key not in self._coordinators:
            for other in self._coordinators.values():  # its workers' cores and GPUs are needed
                ray.kill(other)
            self._coordinators.clear()
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            self._coordinators[key] = RayCoordinator.options(  # type: ignore[attr-defined]
                scheduling_strategy=here
            ).remote(*key)
        return self._coordinators[key]


_backends: dict[str | None, RayBackend] = {}
_follower: RecordStream | None = None


@contextlib.contextmanager
def backend_for(spec: RunSpec, *, address: str | None, debug: bool) -> Iterator[LocalBackend]:
    """The engine that a spec asks for. A Ray engine stays for the next run of this process."""
    here = LocalBackend(debug=debug)
    if debug or (address is None and here.resolve(spec).execution.kind == "serial"):
        yield here
        return
    try:
        yield ray_backend(address)
    except UserError:
        if not _backends[address].cluster.is_up():
            del _backends[address]
            cluster.forget(address)
        raise


def ray_backend(address: str | None) -> RayBackend:
    """This process's engine on a cluster; it joins in the background."""
    if address not in _backends:
        _backends[address] = RayBackend(address)
    return _backends[address]


def follower(warn: Callable[[str], None] | None = None) -> RecordStream:
    """This process's MLflow follower."""
    global _follower
    if _follower is None:
        _follower = RecordStream.start(warn=warn or (lambda text: print(text, file=sys.stderr)))
    return _follower


def in_mlflow(run_dirs: Sequence[Path], warn: Callable[[str], None] | None = None) -> bool:
    """Wait until MLflow holds all of these, the last of which stands for them; ``SYNC_SECONDS`` for each at most.

    What is missing then is told with the way to send it: the records themselves are whole.
    """
    say = warn or (lambda text: print(text, file=sys.stderr))
    feeder = follower(warn)
    is_late = threading.Timer(
        QUIET_SECONDS, say, [f"waiting for MLflow to take the last records, {SYNC_SECONDS:.0f} s at most"]
    )
    is_late.daemon = True
    is_late.start()
    try:
        synced = all(feeder.finished(path, timeout_seconds=SYNC_SECONDS) for path in run_dirs)
    except KeyboardInterrupt:  # the work is done; only the wait is over
        synced = False
    finally:
        is_late.cancel()
    if not synced:
        say(f"MLflow does not hold all records yet; send the rest with: fleetune sync {run_dirs[-1]}")
    return synced


def _check_tracking(spec: RunSpec) -> None:
    if spec.tracking.enabled:
        check_access(spec.tracking.uri)


def base_key(spec: RunSpec) -> str:
    """Runs with the same key name the same base model. What it holds is `BaseModel.key`."""
    return f"{spec.model.base}/{spec.model.quantization}"
