"""The driver of a sweep: it gives out trials, takes their results, and keeps the table of them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.engine.launch import run as launch
from fleetune.engine.launch.directories import git_commit
from fleetune.methods.find import code_path_elsewhere
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.existing_runs import add_trials
from fleetune.sweep.status import OVER, Entry, SweepStatus
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
        """``report`` is called at every change, ``watch`` when a run has begun or ended, so that MLflow gets it."""
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
        """The most trials that are still to be given out; a search may find fewer."""
        return self.sweep_status.num_trials - len(self.sweep_status.entries) + len(self.pending)

    def next_order(self) -> TrialOrder | None:
        """The next trial; None if there is none, or none before another one ends (``max_concurrent``)."""
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
        spec, folders = entry.trial.spec.to_dict(), code_path_elsewhere()
        return TrialOrder(entry.trial.number, spec, str(workspace), entry.run.path.name, meta, folders)

    def is_exhausted(self) -> bool:
        """True once every trial has been given out."""
        return self.num_left == 0

    def on_start(self, number: int) -> None:
        """Called when a trial has a process."""
        self.sweep_status.entries[number].status = "running"
        self.save()
        self.report(self.sweep_status)

    def on_round(self, number: int, result: Mapping[str, Any]) -> None:
        """Called after a round of a trial: the live table moves; after the first, MLflow gets the run."""
        entry = self.sweep_status.entries[number]
        if entry.num_rounds == 0:
            self.watch(entry.run.path)
        entry.num_rounds = int(result["round"])
        entry.metrics = {**entry.metrics, **{k: v for k, v in result["row"].items() if v is not None}}
        entry.totals = {"sim_seconds": result["sim_seconds"], **result["totals"]}
        self.sweep_status.num_rounds_done += 1
        self.report(self.sweep_status)

    def on_end(self, number: int, result: Mapping[str, Any]) -> None:
        """Called when a trial is over: finished, failed, or stopped by the scheduler (``over`` is None).

        A stopped trial gets its result written here: the scheduler just stops calling its process, which cannot do it.
        """
        entry = self.sweep_status.entries[number]
        if result.get("over") is None:
            entry.run.consolidate()
            launch.finish(entry.run, dict(result), status="stopped")
        self.sweep_status.num_rounds_done += 1
        self._close(entry, result.get("error"))

    def on_death(self, number: int, reason: str) -> None:
        """Called when a trial's process has died too often: the reason goes into its directory, and the sweep goes on."""
        entry = self.sweep_status.entries[number]
        if entry.has_begun:
            launch.conclude(entry.run, reason)
        self._close(entry, reason)

    def save(self) -> None:
        """Write the table of trials."""
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
        """Add the next trial of a search that goes by results; if it finds none, the sweep has no more trials."""
        assert self.search is not None
        number = len(self.sweep_status.entries)
        earlier = {entry.trial.spec.spec_hash for entry in self.sweep_status.entries.values()}
        trial = self.search.propose(number, earlier)
        if trial is None:
            self.sweep_status.num_trials = number
            return
        add_trials(self.sweep_status, [trial], self.directory.path)
        proposed = [entry.trial.overrides for _, entry in sorted(self.sweep_status.entries.items())]
        self.directory.update_meta(proposed=proposed)
        entry = self.sweep_status.entries[number]
        if entry.status in OVER:
            self.search.tell(trial, self.sweep_status.value(entry))
            self._propose()
        else:
            self.pending.append(number)
