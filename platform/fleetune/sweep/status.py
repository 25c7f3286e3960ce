"""The status of a sweep's trials while it runs: how far each is, the best so far, and the time that is left."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fleetune.columns import TRIAL_COLUMNS, names
from fleetune.records.run_directory import RunDirectory
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.expansion import Trial, label
from fleetune.units import duration

OVER = ("finished", "stopped")  # a trial that failed is tried again by the next launch
STATES = ("finished", "stopped", "failed", "running", "missing")
METRICS, TOTALS = names(TRIAL_COLUMNS, "metric"), names(TRIAL_COLUMNS, "total")


@dataclass
class Entry:
    """A trial and how far its run is."""

    trial: Trial
    run: RunDirectory
    status: str = "missing"
    error: str | None = None
    num_rounds: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)

    @property
    def has_begun(self) -> bool:
        """True if the trial has a run directory."""
        return (self.run.path / RunDirectory.SPEC).is_file()

    def take_result(self) -> None:
        """Replace what was reported on the way by the run's ``result.json``: the truth about a trial that is over."""
        result = self.run.result() or {}
        self.status = str(result.get("status", "missing"))
        self.error = result.get("error")
        self.metrics, self.totals = result.get("metrics") or {}, result.get("totals") or {}
        self.num_rounds = int(self.totals.get("num_rounds", 0))

    def row(self) -> dict[str, Any]:
        """The trial's row in ``trials.parquet``, with results only if it is over: before, they would depend on when one looks."""
        spec = self.trial.spec
        is_over = self.status in OVER
        results = {**{k: self.metrics.get(k) for k in METRICS}, **{k: self.totals.get(k) for k in TOTALS}}
        return {
            "trial": self.trial.number,
            "run_id": self.run.path.name,
            "run_dir": self.run.path if self.has_begun else None,
            "status": self.status,
            "error": self.error,
            "spec_hash": spec.spec_hash,
            "method": spec.method.name,
            "seed": spec.seed,
            "overrides": self.trial.overrides,
            **({**results, "num_rounds": self.num_rounds} if is_over else {}),
        }


class SweepStatus:
    """All trials of a sweep, by number. A search that goes by results adds them as it proposes them."""

    def __init__(self, sweep: SweepSpec, *, num_trials: int):
        self.sweep, self.num_trials = sweep, num_trials
        self.entries: dict[int, Entry] = {}
        self.started = time.monotonic()
        self.num_rounds_done = 0
        """Rounds that trials have done in this launch."""

    def counts(self) -> dict[str, int]:
        """Trials by state; those that a search has not proposed yet are missing."""
        found = Counter(entry.status for entry in self.entries.values())
        found["missing"] += self.num_trials - len(self.entries)
        return {state: found[state] for state in STATES if found[state]}

    def value(self, entry: Entry) -> float | None:
        """The trial's value of the sweep's metric so far; None if it has none, or no finite one."""
        value = {**entry.totals, **entry.metrics}.get(self.sweep.metric)
        return float(value) if value is not None and math.isfinite(value) else None

    def best(self) -> Entry | None:
        """The best trial so far, the first of equals; a trial that failed does not count."""
        scored = [(entry, self.value(entry)) for _, entry in sorted(self.entries.items())]
        candidates = [(entry, value) for entry, value in scored if value is not None and entry.status != "failed"]
        return max(candidates, key=lambda pair: self.sweep.sign * pair[1])[0] if candidates else None

    def best_line(self) -> str | None:
        """The best trial in a line; None if there is none yet."""
        best = self.best()
        if best is None:
            return None
        value = self.value(best)
        shown = f"{value:.1%}" if self.sweep.metric == "eval_accuracy" else f"{value:.4g}"
        return f"{self.sweep.metric} {shown} ({label(best.trial.overrides) or best.run.path.name})"

    def rounds_left(self) -> int:
        """Rounds that are still to be run if no trial is stopped early."""
        over = {*OVER, "failed"}
        specs = [(e.trial.spec.rounds.num_rounds, e) for e in self.entries.values() if e.status not in over]
        typical = max((e.trial.spec.rounds.num_rounds for e in self.entries.values()), default=0)
        to_be_proposed = (self.num_trials - len(self.entries)) * typical
        return sum(rounds - entry.num_rounds for rounds, entry in specs) + to_be_proposed

    def cost_line(self) -> str:
        """What a launch will cost, before it starts: trials, rounds and turns of clients that are left.

        If some trials are finished, so is the time: theirs for each round, in one process.
        """
        entries = list(self.entries.values())
        over = [entry for entry in entries if entry.status in OVER]
        num_left = self.num_trials - len(over)
        text = f"{self.num_trials} trials" + (f", {len(over)} of them finished already" if over else "")
        if not num_left:
            return f"{text}: nothing is to be run"
        rounds = [entry.trial.spec.rounds for entry in entries]
        num_rounds = sum(entry.trial.spec.rounds.num_rounds for entry in entries if entry.status not in OVER)
        num_rounds += (self.num_trials - len(entries)) * max((each.num_rounds for each in rounds), default=0)
        text += f"; {num_left} to run"
        if num_rounds:  # a search that has proposed nothing yet does not know its trials
            ends_early = self.sweep.early_stopping is not None or any(each.max_sim_seconds for each in rounds)
            clients = max(each.clients_per_round for each in rounds)
            text += f": {'at most ' if ends_early else ''}{num_rounds:,} rounds of {clients} clients"
        done = [entry for entry in over if entry.totals.get("wall_seconds") and entry.num_rounds]
        if done and num_rounds:
            pace = sum(entry.totals["wall_seconds"] for entry in done) / sum(entry.num_rounds for entry in done)
            text += f", about {duration(pace * num_rounds)} in one process, as long as those took"
        return text

    def eta_seconds(self) -> float | None:
        """Real time to the end at the pace of this launch; None before its first round."""
        if self.num_rounds_done == 0:
            return None
        return (time.monotonic() - self.started) / self.num_rounds_done * self.rounds_left()
