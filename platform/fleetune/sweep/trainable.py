"""A trial on Ray Tune: a step is a round, the run directory is the checkpoint, and the process stays for the next trial."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from fleetune.engine.coordinator import Event
from fleetune.engine.execution.executor import Executor
from fleetune.engine.execution.ray_pool import RayExecutor
from fleetune.engine.execution.ray_worker import SharedInputs
from fleetune.engine.launch.resolve import gpu_fraction
from fleetune.problem import Inputs, Problem
from fleetune.sweep.trial_runner import TrialOrder, TrialRunner, inputs_key

METRICS = ("train_loss", "eval_loss", "eval_accuracy")  # with sim_seconds and these, what a sweep can go by
TOTALS = ("uplink_bytes", "energy_joules")


class TrialProcess(tune.Trainable):
    """Runs what ``config["order"]`` says. The workers of a gang are its children, in the trial's placement group."""

    def setup(self, config: dict[str, Any], shared: Mapping[str, SharedInputs] | None = None) -> None:
        """A fresh process. ``shared``: inputs in the object store, by key."""
        self._shared = shared or {}
        self._resident = TrialRunner(fetch=self._fetch, make_workers=self._make_workers)
        self._workers: RayExecutor | None = None
        self._events: Iterator[Event] | None = None
        self._order = TrialOrder(**json.loads(config["order"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial; one that was stopped early lets go of its directory."""
        self._close()
        self._order = TrialOrder(**json.loads(new_config["order"]))
        return True

    def step(self) -> dict[str, Any]:
        """One round."""
        if self._events is None:
            self._events = self._resident.run(self._order)
        event = next(self._events)
        over = event.get("over")
        row = event.get("row") or {}
        metrics = {name: row[name] for name in METRICS if row.get(name) is not None}
        told: dict[str, Any] = {
            k: event[k] for k in ("round", "num_rounds", "sim_seconds", "totals", "baseline") if k in event
        }
        totals = {name: value for name, value in told.get("totals", {}).items() if name in TOTALS}
        return {
            "number": self._order.number,
            "over": over,
            "error": event.get("error"),
            "row": row,
            "done": over is not None,
            **told,
            **totals,
            **metrics,
        }

    def cleanup(self) -> None:
        """The process ends."""
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


@ray.remote(num_cpus=0)
def sees(path: str) -> bool:
    """Whether a node sees a file of the driver's."""
    return Path(path).is_file()
