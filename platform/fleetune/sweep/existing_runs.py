"""The runs of a workspace that a sweep need not do again: its own from earlier launches, and finished ones of the same job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fleetune.engine.launch.directories import git_commit
from fleetune.errors import UserError
from fleetune.problem.content import Contents, identity
from fleetune.records.run_directory import FORMAT, RunDirectory
from fleetune.sweep.expansion import Trial, in_trial
from fleetune.sweep.status import OVER, Entry, SweepStatus


class ExistingRuns(NamedTuple):
    """Numbers of existing runs that the user is warned of."""

    num_of_other_code: int
    """Finished by another version of the code; their results are taken as they are."""
    num_outdated: int
    """Runs of this sweep that do not count: what they read has changed since, or their version did not note it."""


def add_trials(sweep_status: SweepStatus, trials: Sequence[Trial], sweep_path: Path) -> ExistingRuns:
    """Enter trials into the sweep's status, each with its existing run: this sweep's own, or a finished one of the same job.

    A run counts only if it read what the trial would read now. One that read something else stays as it is, and the trial gets
    a new run directory beside it.
    """
    workspace = sweep_path.parent.parent
    finished_runs, contents = _finished_runs(workspace), Contents()
    commit, num_of_other_code, num_outdated = git_commit(), 0, 0
    for trial in trials:
        entry = Entry(trial, RunDirectory(workspace / "runs" / f"{sweep_path.name}-{trial.number:03d}"))
        finished = finished_runs.get(trial.spec.spec_hash, [])
        if entry.has_begun or finished:
            wanted = _identity(trial, contents)
            finished = [run for run in finished if run.meta.get("identity") == wanted]
            if entry.has_begun and (entry.run.format != FORMAT or entry.run.meta.get("identity") != wanted):
                entry = Entry(trial, RunDirectory(entry.run.path.with_name(f"{entry.run.path.name}-{wanted[:6]}")))
                num_outdated += 1
        if entry.has_begun:
            entry.take_result()
        if entry.status not in OVER and finished:
            entry = Entry(trial, finished[0])
            entry.take_result()
            num_of_other_code += finished[0].meta.get("git_commit") != commit
        sweep_status.entries[trial.number] = entry
    return ExistingRuns(num_of_other_code, num_outdated)


def _finished_runs(workspace: Path) -> dict[str, list[RunDirectory]]:
    """spec_hash -> finished runs of that spec, by name. What each of them read is in its ``meta``."""
    found: dict[str, list[RunDirectory]] = {}
    for path in sorted((workspace / "runs").glob("*/result.json")):
        run = RunDirectory(path.parent)
        try:
            spec_hash, status = run.meta.get("spec_hash"), (run.result() or {}).get("status")
            is_readable = run.format == FORMAT
        except (OSError, ValueError):  # another user's, or damaged: not one to rely on
            continue
        if spec_hash and status == "finished" and is_readable:
            found.setdefault(str(spec_hash), []).append(run)
    return found


def _identity(trial: Trial, contents: Contents) -> str:
    try:
        return identity(trial.spec, contents.of(trial.spec))
    except UserError as error:
        raise in_trial(error, trial.number, trial.overrides) from None
