"""Runs one trial after the other in a process, which keeps base model, data, networks and baseline for the next one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.engine.coordinator import Coordinator, Event
from fleetune.engine.evaluation import Baselines
from fleetune.engine.execution.executor import Executor, SerialExecutor
from fleetune.engine.execution.worker_process import placed_base
from fleetune.engine.launch.backends import base_key
from fleetune.engine.launch.directories import locked, run_meta
from fleetune.engine.launch.run import conclude, finish
from fleetune.methods.find import look_in
from fleetune.models.base import BaseModel
from fleetune.problem import Inputs, Problem, build_problem, load_inputs, set_threads
from fleetune.problem.content import check_content
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec, from_dict

MAX_INPUTS = 4  # assumed: trials of a few seeds take turns
MAX_PLACED = 2  # assumed: two base models take turns
LOCK_PATIENCE_SECONDS = 60.0  # a process that was killed with its sweep is gone long before


@dataclass(frozen=True)
class TrialOrder:
    """Everything a process needs to run a trial."""

    number: int
    spec: dict[str, Any]
    workspace: str
    run_id: str
    meta: dict[str, Any]
    folders: tuple[str, ...] = ()
    """Folders in which the module of a method from outside is looked for."""

    @property
    def run_path(self) -> Path:
        """The trial's run directory."""
        return Path(self.workspace) / "runs" / self.run_id

    def to_json(self) -> str:
        """The order as JSON text, which Ray Tune passes on unchanged."""
        return json.dumps(vars(self))


def inputs_key(spec: RunSpec) -> str:
    """The key of a run's inputs: runs with the same key share model and data.

    How the data are partitioned is no part of it, except for the columns that partitioning reads.
    """
    data = spec.data.model_dump(exclude={"partition": {"alpha", "shards_per_client", "min_examples"}}, mode="json")
    targets = spec.model.lora.model_dump(mode="json")["targets"]
    fleet = spec.fleet.model_dump(include={"availability", "device_files", "devices", "num_clients"}, mode="json")
    reads = spec.fleet.availability.path is not None or spec.fleet.device_files
    facts = [base_key(spec), targets, data, spec.seed, fleet if reads else None, spec.method.traits.references]
    return json.dumps(facts, sort_keys=True)


Fetch = Callable[[str], Inputs | None]
MakeWorkers = Callable[[Problem], Executor]


class TrialRunner:
    """Runs trials, and keeps between them what the next one can use again."""

    def __init__(self, *, fetch: Fetch | None = None, make_workers: MakeWorkers | None = None):
        """``fetch``: inputs by key if they are loaded already, else None; ``make_workers``: the executor of a gang."""
        self._fetch, self._make_workers = fetch, make_workers
        self._inputs: dict[str, Inputs] = {}
        self._placed: dict[Any, tuple[BaseModel, dict[Any, Any]]] = {}
        """Base models on the device that computes with them, each with the networks over it."""
        self._baselines: Baselines = {}

    def run(self, order: TrialOrder) -> Iterator[Event]:
        """Run the trial's remaining rounds. After a failure, they are tried once more from the last complete round.

        Events are the coordinator's, the last one with ``over``: finished, or failed with its ``error``.
        """
        run_dir: RunDirectory | None = None
        try:
            for folder in reversed(order.folders):
                look_in(folder)
            spec = from_dict(order.spec)
            problem = build_problem(spec, self.inputs(spec))
            run_dir = self._directory(order, problem)
            with locked(run_dir, patience_seconds=LOCK_PATIENCE_SECONDS):
                yield from self._rounds(problem, run_dir)
        except Exception as error:
            text = str(error) or type(error).__name__
            if run_dir is not None:
                conclude(run_dir, text)
            yield {"kind": "end", "over": "failed", "error": text}

    def _rounds(self, problem: Problem, run_dir: RunDirectory) -> Iterator[Event]:
        """The remaining rounds; none if the run had finished but the process waiting for its result was killed."""
        if (run_dir.result() or {}).get("status") == "finished":
            yield {"kind": "end", "over": "finished"}
            return
        set_threads(int(problem.spec.execution.threads))
        try:
            yield from self._attempt(problem, run_dir)
        except Exception:
            self._placed.clear()  # the failure may have left the networks in any state
            yield from self._attempt(problem, run_dir)

    def _attempt(self, problem: Problem, run_dir: RunDirectory) -> Iterator[Event]:
        event: Event = {}
        for event in Coordinator(problem, self._executor(problem), run_dir, baselines=self._baselines).run():
            if event["kind"] == "round" and event["round"] < event["num_rounds"]:  # the last round comes with the end
                yield event
        finish(run_dir, event)
        yield {**event, "over": "finished"}

    def inputs(self, spec: RunSpec) -> Inputs:
        """Model and data of a run: kept, fetched or loaded, in this order."""
        key = inputs_key(spec)
        found = self._inputs.pop(key, None) or (self._fetch(key) if self._fetch else None)
        found = found or load_inputs(spec, base=self._base(spec))
        while len(self._inputs) >= MAX_INPUTS:
            del self._inputs[next(iter(self._inputs))]
        self._inputs[key] = found  # the last used stands last, and the first is dropped first
        return found

    def _base(self, spec: RunSpec) -> BaseModel | None:
        """The base model of other inputs of this process, if it is the same; `inputs_key` begins with the base's key."""
        key_of_base = json.dumps(base_key(spec))
        return next((inputs.base for key, inputs in self._inputs.items() if key.startswith(f"[{key_of_base},")), None)

    def _executor(self, problem: Problem) -> Executor:
        if problem.spec.execution.kind == "ray" and self._make_workers is not None:
            return self._make_workers(problem)
        spec = problem.spec
        key = (problem.inputs.base.key, spec.execution.device, spec.execution.precision)
        base, networks = self._placed.pop(key) if key in self._placed else (placed_base(spec, problem.inputs.base), {})
        while len(self._placed) >= MAX_PLACED:
            del self._placed[next(iter(self._placed))]
        self._placed[key] = base, networks  # the last used stands last, and the first is dropped first
        executor = SerialExecutor(problem, base=base)
        executor.process.worker.adopt(networks.setdefault(spec.model.lora, {}))
        return executor

    def _directory(self, order: TrialOrder, problem: Problem) -> RunDirectory:
        if (order.run_path / RunDirectory.SPEC).is_file():
            run_dir = RunDirectory.open(order.run_path)
            check_content(problem.job, run_dir.meta.get("content"), problem.content, run=str(order.run_path))
            return run_dir
        meta = {**run_meta(problem), **order.meta}
        return RunDirectory.create(order.workspace, order.run_id, problem.job.to_dict(), meta=meta)
