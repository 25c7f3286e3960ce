"""A sweep's trials: which comes next, what became of each, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fleetune.content import Contents, identity
from fleetune.engine.launch import run as launch
from fleetune.engine.launch.directories import git_commit
from fleetune.errors import UserError
from fleetune.records.run_directory import RunDirectory
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.expansion import Trial, in_trial
from fleetune.sweep.status import OVER, Entry, SweepStatus
from fleetune.sweep.store import finished_runs
from fleetune.sweep.trial_runner import TrialOrder

if TYPE_CHECKING:
    from fleetune.sweep.optuna_search import OptunaSearch

Report = Callable[[SweepStatus], None]
Watch = Callable[[Path], None]


class Driver:
    """Gives out trials and takes their results; :mod:`fleetune.sweep.tune` calls it."""

    def __init__(
        self,
        sweep: SweepSpec,
        directory: SweepDirectory,
        sweep_status: SweepStatus,
        *,
        search: OptunaSearch | None = None,
        report: Report,
        watch: Watch,
    ):
        """``watch``: a run has begun or ended, and MLflow should know."""
        self.sweep, self.directory, self.sweep_status, self.search = sweep, directory, sweep_status, search
        self.report, self.watch = report, watch
        self.pending = [n for n, entry in sorted(sweep_status.entries.items()) if entry.status not in OVER]
        self.given_out: set[int] = set()
        """Trials that wait for a process or have one."""
        self.commit = git_commit()
        if search is not None:
            for entry in sweep_status.entries.values():
                if entry.status in OVER:
                    search.tell(entry.trial, sweep_status.value(entry))

    @property
    def num_left(self) -> int:
        """Trials that are still to be given out, at most."""
        return self.sweep_status.num_trials - len(self.sweep_status.entries) + len(self.pending)

    def next_order(self) -> TrialOrder | None:
        """The next trial; None where there is none, or none for now."""
        if self.sweep.max_concurrent is not None and len(self.given_out) >= self.sweep.max_concurrent:
            return None
        if not self.pending and self.num_left:
            self._propose()
        if not self.pending:
            return None
        entry = self.sweep_status.entries[self.pending.pop(0)]
        entry.status, entry.error = "missing", None
        self.given_out.add(entry.trial.number)
        meta = {
            "sweep": self.sweep.name,
            "parent_run_dir": f"../../sweeps/{self.directory.path.name}",
            "overrides": entry.trial.overrides,
            "git_commit": self.commit,
            "text": self.directory.meta.get("text"),
        }
        workspace = self.directory.path.parent.parent
        return TrialOrder(entry.trial.number, entry.trial.spec.to_dict(), str(workspace), entry.run.path.name, meta)

    def is_exhausted(self) -> bool:
        """Whether every trial has been given out."""
        return self.num_left == 0

    def on_start(self, number: int) -> None:
        """A trial has a process."""
        self.sweep_status.entries[number].status = "running"
        self.save()
        self.report(self.sweep_status)

    def on_round(self, number: int, result: Mapping[str, Any]) -> None:
        """A round is over: the live table moves, and MLflow gets it."""
        entry = self.sweep_status.entries[number]
        if entry.num_rounds == 0:
            self.watch(entry.run.path)
        entry.num_rounds = int(result["round"])
        entry.metrics = {**entry.metrics, **{k: v for k, v in result["row"].items() if v is not None}}
        entry.totals = {"sim_seconds": result["sim_seconds"], **result["totals"]}
        self.sweep_status.num_rounds_done += 1
        self.report(self.sweep_status)

    def on_end(self, number: int, result: Mapping[str, Any]) -> None:
        """A trial is over. One that the scheduler stopped gets its result here, because its process was not asked."""
        entry = self.sweep_status.entries[number]
        if result.get("over") is None:
            entry.run.consolidate()
            launch.finish(entry.run, dict(result), status="stopped")
        self.sweep_status.num_rounds_done += 1
        self._close(entry, result.get("error"))

    def on_death(self, number: int, reason: str) -> None:
        """A trial's process died too often: its directory says so, and the sweep goes on."""
        entry = self.sweep_status.entries[number]
        if entry.has_begun:
            launch.conclude(entry.run, reason)
        self._close(entry, reason)

    def save(self) -> None:
        """Write the table."""
        self.directory.write_trials(entry.row() for _, entry in sorted(self.sweep_status.entries.items()))

    def _close(self, entry: Entry, error: str | None) -> None:
        self.given_out.discard(entry.trial.number)
        if entry.has_begun:
            entry.take_result()
            self.watch(entry.run.path)
        else:
            entry.status, entry.error = "failed", error
        if self.search is not None:
            self.search.tell(entry.trial, None if entry.status == "failed" else self.sweep_status.value(entry))
        self.save()
        self.report(self.sweep_status)

    def _propose(self) -> None:
        """The next trial of a search that goes by results; where it finds none, the sweep has no more trials."""
        assert self.search is not None
        number = len(self.sweep_status.entries)
        known = {entry.trial.spec.spec_hash for entry in self.sweep_status.entries.values()}
        trial = self.search.propose(number, known)
        if trial is None:
            self.sweep_status.num_trials = number
            return
        take_stock(self.sweep_status, [trial], self.directory.path)
        proposed = [entry.trial.overrides for _, entry in sorted(self.sweep_status.entries.items())]
        self.directory.update_meta(proposed=proposed)
        entry = self.sweep_status.entries[number]
        if entry.status in OVER:
            self.search.tell(trial, self.sweep_status.value(entry))
            self._propose()
        else:
            self.pending.append(number)


class Stock(NamedTuple):
    """What was remarkable about the runs that were there already, in trials."""

    of_other_code: int
    """Finished by another version of the code, and taken as they are."""
    outdated: int
    """This sweep's own, but what they read has changed since, or they are of a version that did not note it."""


def take_stock(sweep_status: SweepStatus, trials: Sequence[Trial], sweep_path: Path) -> Stock:
    """Enter trials with what is there of them: this sweep's own runs, or the same job finished by whoever.

    A run counts where it read what the trial would read now; otherwise it stays as it is, and another begins beside it.
    """
    workspace = sweep_path.parent.parent
    elsewhere, contents = finished_runs(workspace), Contents()
    commit, others, outdated = git_commit(), 0, 0
    for trial in trials:
        entry = Entry(trial, RunDirectory(workspace / "runs" / f"{sweep_path.name}-{trial.number:03d}"))
        finished = elsewhere.get(trial.spec.spec_hash, [])
        if entry.has_begun or finished:
            wanted = _identity(trial, contents)
            finished = [run for run in finished if run.meta.get("identity") == wanted]
            if entry.has_begun and entry.run.meta.get("identity") != wanted:
                entry = Entry(trial, RunDirectory(entry.run.path.with_name(f"{entry.run.path.name}-{wanted[:6]}")))
                outdated += 1
        if entry.has_begun:
            entry.take_result()
        if entry.status not in OVER and finished:
            entry = Entry(trial, finished[0])
            entry.take_result()
            others += finished[0].meta.get("git_commit") != commit
        sweep_status.entries[trial.number] = entry
    return Stock(others, outdated)


def _identity(trial: Trial, contents: Contents) -> str:
    try:
        return identity(trial.spec, contents.of(trial.spec))
    except UserError as error:
        raise in_trial(error, trial.number, trial.overrides) from None
