"""Sending a run, or a sweep with its trials, to MLflow: what the store does not hold yet, once."""

from __future__ import annotations

from pathlib import Path

from fleetune.errors import UserError
from fleetune.records.run_directory import RunDirectory, parent_of
from fleetune.records.sweep_directory import SweepDirectory, open_directory
from fleetune.tracking.access import check_access, without_password
from fleetune.tracking.client import is_of_the_store
from fleetune.tracking.sweep import SweepTracker
from fleetune.tracking.tracker import SyncReport, Tracker


def sync(run_dir: str | Path, *, uri: str | None = None) -> SyncReport:
    """Sends what the store lacks of a run, or of a sweep and all its trials. Raises UserError if the store cannot be used."""
    run = open_directory(run_dir)
    tracker = tracker_of(run, uri=uri)
    check_access(tracker.uri)
    trials = own_trials(run) if isinstance(run, SweepDirectory) else []
    for checked in (run, *trials):  # what was damaged is not passed on
        checked.check()
    try:
        reports = [Tracker(trial, uri=uri).push() for trial in trials]
        sent = tracker.push()
        for report in reports:
            sent = sent.with_parts_of(report)
        return sent
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not is_of_the_store(error):
            hint = "restore the file that is damaged, or run it again"
            raise UserError(f"cannot be read: {reason}", field="run_dir", value=str(run.path), hint=hint) from error
        hint = f"is the server up? later: fleetune sync {run.path}"
        where = without_password(tracker.uri)
        raise UserError(f"MLflow cannot be reached: {reason}", field="tracking.uri", value=where, hint=hint) from error


def tracker_of(run: RunDirectory, *, uri: str | None = None, live: bool = False) -> Tracker:
    """A run's tracker, or a sweep's."""
    return (
        SweepTracker(run, uri=uri, live=live) if isinstance(run, SweepDirectory) else Tracker(run, uri=uri, live=live)
    )


def own_trials(sweep: SweepDirectory) -> list[RunDirectory]:
    """The trials that this sweep ran itself; others were taken as they were found."""
    runs = [run for run in sweep.runs() if parent_of(run) == sweep.path]
    return [run for run in runs if run.path.is_relative_to(sweep.workspace)]
