"""From a spec to a finished run: checks, the run directory, MLflow, and going on after a kill."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleetune import files
from fleetune.columns import PERSONAL
from fleetune.engine.coordinator import Event
from fleetune.engine.divergence import Notices
from fleetune.engine.launch.backends import LocalBackend, backend_for
from fleetune.engine.launch.directories import locked, new_run_directory
from fleetune.errors import RunFailed, Stopped, UserError
from fleetune.methods.find import look_in
from fleetune.problem import Problem, build_problem
from fleetune.problem.content import check_content, code_content
from fleetune.records.run_directory import RunDirectory
from fleetune.records.timeline import write_timeline
from fleetune.spec import RunSpec, from_dict
from fleetune.tracking.access import check_access
from fleetune.tracking.stream import RecordStream

Report = Callable[[Event], None]
SYNC_SECONDS = 60.0  # how long to wait for a run's last records to arrive in MLflow
QUIET_SECONDS = 3.0  # a shorter wait is not mentioned


@dataclass(frozen=True)
class Result:
    """The outcome of a run."""

    run_id: str
    run_dir: Path
    status: str
    metrics: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    synced: bool | None = None
    """True if MLflow holds all of it; None if it was not to be sent there."""

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it; ``synced`` only if it is false."""
        return {**without_synced(vars(self)), "run_dir": str(self.run_dir)}


def without_synced(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A result's fields, without ``synced`` unless it is false: only then has the user something to do."""
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
    admits: Callable[[Problem], None] | None = None,
) -> Result:
    """Check everything, then run. Raises UserError before any client trains; RunFailed leaves a directory that can be resumed.

    ``admits``: what else is checked before a directory is made; it raises UserError.
    """
    _check_tracking(spec)
    with backend_for(spec, address=address, debug=debug) as backend:
        spec = backend.placed(backend.resolve(spec))
        problem = build_problem(spec, backend.inputs(spec))
        if admits is not None:
            admits(problem)
        if warn is not None:
            for note in problem.fleet.rate_notes(spec.cost.precision):
                warn(note)
        run_dir = new_run_directory(problem, workspace, meta or {})
        return _execute(backend, problem, run_dir, report=report, warn=warn)


def resume(
    path: Path,
    *,
    address: str | None = None,
    debug: bool = False,
    report: Report | None = None,
    warn: Callable[[str], None] | None = None,
) -> Result:
    """Go on after the last finished round, with the same bits as a run that was never stopped."""
    run_dir = RunDirectory.open(path)
    folders = run_dir.meta.get("code_path", ())  # only of a run with a method from outside
    for folder in reversed(folders):
        look_in(folder)
    try:
        spec = from_dict(run_dir.spec)
    except files.Damaged:
        raise
    except UserError as error:
        if folders and error.field == "method.name":  # the file is what it was, but the method is gone
            raise
        raise files.damaged(run_dir.path / RunDirectory.SPEC, error, holds="what was run") from None
    meta, result = run_dir.meta, run_dir.result()
    recorded = meta.get("spec_hash")
    if meta.get("content") is None:
        # Written by a version that hashed other things. A finished run is shown all the same; `check_content` refuses others.
        recorded = None
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
        # No ``auto`` is left in the spec, but there may be fewer cores or GPUs here than it was resolved for.
        spec = backend.placed(backend.resolve(spec))
        inputs = backend.inputs(spec)
        check_content(
            spec, meta.get("content"), {**inputs.content, **code_content(spec), **spec.method.content()}, run=str(path)
        )
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
            record_stream(warn).watch(run_dir.path)
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
        except files.Damaged:  # nothing is written to a directory that is damaged: it stays as it was found
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
    """Write the tables and the result of a run that failed. If the disk has no room for them, the records are there in parts."""
    with contextlib.suppress(files.WriteFailed, files.Damaged):
        run_dir.consolidate()
        run_dir.write_result({"status": "failed", "error": str(error), "metrics": {}, "totals": {}})


def finish(run_dir: RunDirectory, event: Event, *, status: str = "finished") -> Result:
    """Write the timeline and the result of a run whose last event this is. ``status``: ``stopped`` if rounds were left out."""
    row = event["row"]
    metrics = {name: row.get(name) for name in ("train_loss", "eval_loss", "eval_accuracy")}
    metrics.update({name: row[name] for name in PERSONAL if row.get(name) is not None})
    metrics.update({f"baseline_{name}": value for name, value in event["baseline"].items()})
    # JSON knows neither NaN nor infinity, and null alone would say that there was no evaluation.
    not_finite = [name for name, value in metrics.items() if value is not None and not math.isfinite(value)]
    metrics.update(dict.fromkeys(not_finite))
    totals = {"num_rounds": event["round"], "sim_seconds": event["sim_seconds"], **event["totals"]}
    write_timeline(run_dir)
    result = {"status": status, "metrics": metrics, "totals": totals}
    run_dir.write_result({**result, "not_finite": not_finite} if not_finite else result)
    return Result(run_dir.run_id, run_dir.path, status, metrics, totals)


_record_stream: RecordStream | None = None


def record_stream(warn: Callable[[str], None] | None = None) -> RecordStream:
    """This process's record stream to MLflow, which the first call starts."""
    global _record_stream
    if _record_stream is None:
        _record_stream = RecordStream.start(warn=warn or (lambda text: print(text, file=sys.stderr)))
    return _record_stream


def in_mlflow(run_dirs: Sequence[Path], warn: Callable[[str], None] | None = None) -> bool:
    """Wait until MLflow holds all of these directories, for each `SYNC_SECONDS` at most; returns True if it does.

    If not, the user is shown the command that sends the rest, for the last directory: a run, or the sweep of all the others. The
    directories themselves have all their records.
    """
    say = warn or (lambda text: print(text, file=sys.stderr))
    stream = record_stream(warn)
    notice = threading.Timer(
        QUIET_SECONDS, say, [f"waiting for MLflow to take the last records, {SYNC_SECONDS:.0f} s at most"]
    )
    notice.daemon = True
    notice.start()
    try:
        synced = all(stream.finished(path, timeout_seconds=SYNC_SECONDS) for path in run_dirs)
    except KeyboardInterrupt:  # the work is done; only the wait is over
        synced = False
    finally:
        notice.cancel()
    if not synced:
        say(f"MLflow does not hold all records yet; send the rest with: fleetune sync {run_dirs[-1]}")
    return synced


def _check_tracking(spec: RunSpec) -> None:
    if spec.tracking.enabled:
        check_access(spec.tracking.uri)
