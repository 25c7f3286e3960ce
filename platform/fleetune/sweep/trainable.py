"""Trials on Ray Tune: a step is a round, the run directory is the checkpoint, and a process goes on to the next trial."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from ray import tune

from fleetune.columns import TRIAL_COLUMNS, names
from fleetune.engine.coordinator import Event
from fleetune.engine.execution.executor import Executor
from fleetune.engine.execution.ray_pool import RayExecutor
from fleetune.engine.execution.ray_worker import SharedInputs
from fleetune.engine.launch.resolve import gpu_fraction
from fleetune.problem import Inputs, Problem
from fleetune.sweep.config import Metric
from fleetune.sweep.trial_runner import TrialOrder, TrialRunner, inputs_key

# What a sweep can go by (`Metric`), by the part of an event that has it. Virtual time is in the event itself.
METRICS = tuple(name for name in names(TRIAL_COLUMNS, "metric") if name in get_args(Metric))
TOTALS = tuple(name for name in names(TRIAL_COLUMNS, "total") if name in get_args(Metric))


class TrialProcess(tune.Trainable):
    """Runs the trial in ``config["order"]``. The workers of a gang are its children, in the trial's placement group."""

    def setup(self, config: dict[str, Any], shared: Mapping[str, SharedInputs] | None = None) -> None:
        """Called by Tune in a fresh process. ``shared``: inputs in the object store, by key."""
        self._shared = shared or {}
        self._runner = TrialRunner(fetch=self._fetch, make_workers=self._make_workers)
        self._workers: RayExecutor | None = None
        self._events: Iterator[Event] | None = None
        self._order = TrialOrder(**json.loads(config["order"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Tune for the next trial; one that was stopped early lets go of its directory's lock."""
        self._close()
        self._order = TrialOrder(**json.loads(new_config["order"]))
        return True

    def step(self) -> dict[str, Any]:
        """Called by Tune for the next round; returns what the driver and the scheduler need of it."""
        if self._events is None:
            self._events = self._runner.run(self._order)
        event = next(self._events)
        over = event.get("over")
        row = event.get("row") or {}
        metrics = {name: row[name] for name in METRICS if row.get(name) is not None}
        progress: dict[str, Any] = {
            k: event[k] for k in ("round", "num_rounds", "sim_seconds", "totals", "baseline") if k in event
        }
        totals = {name: value for name, value in progress.get("totals", {}).items() if name in TOTALS}
        return {
            "number": self._order.number,
            "over": over,
            "error": event.get("error"),
            "row": row,
            "done": over is not None,
            **progress,
            **totals,
            **metrics,
        }

    def cleanup(self) -> None:
        """Called by Tune before the process ends."""
        self._close()

    def _close(self) -> None:
        if self._events is not None:
            self._events.close()  # type: ignore[attr-defined]
        self._events = None

    def _fetch(self, key: str) -> Inputs | None:
        shared = self._shared.get(key)
        return shared.get() if shared else None

    def _make_workers(self, problem: Problem) -> Executor:
        execution = problem.spec.execution
        if self._workers is None:
            self._workers = RayExecutor(int(execution.workers), int(execution.threads), gpu_fraction(execution))
        self._workers.prepare(problem.inputs.base.key, problem.spec, type(problem.method), self._put(problem))
        return self._workers

    def _put(self, problem: Problem) -> SharedInputs:
        return self._shared.get(inputs_key(problem.spec)) or SharedInputs.put(problem.inputs)
