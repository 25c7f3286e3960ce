"""A process that runs one trial after the other: base model, data, networks and untrained quality stay for the next one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.content import check_content
from fleetune.engine.coordinator import Baselines, Coordinator, Event
from fleetune.engine.execution.executor import Executor, SerialExecutor
from fleetune.engine.execution.worker_process import placed_base
from fleetune.engine.launch.backends import base_key
from fleetune.engine.launch.directories import locked, run_meta
from fleetune.engine.launch.run import conclude, finish
from fleetune.models.base import BaseModel
from fleetune.problem import Inputs, Problem, build_problem, load_inputs, set_threads
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec, from_dict

MAX_INPUTS = 4  # assumed: trials of a few seeds take turns
MAX_PLACED = 2  # assumed: two base models take turns
LOCK_PATIENCE_SECONDS = 60.0  # a process that was killed with its sweep is gone long before


@dataclass(frozen=True)
class TrialOrder:
    """What a process needs to know of a trial."""

    number: int
    spec: dict[str, Any]
    workspace: str
    run_id: str
    meta: dict[str, Any]

    @property
    def run_path(self) -> Path:
        """The trial's run directory."""
        return Path(self.workspace) / "runs" / self.run_id

    def to_json(self) -> str:
        """As text, which Ray Tune passes on as it is."""
        return json.dumps(vars(self))


def inputs_key(spec: RunSpec) -> str:
    """Runs with the same key share model and data; how data are dealt matters only as far as columns are concerned."""
    data = spec.data.model_dump(exclude={"partition": {"alpha", "shards_per_client", "min_examples"}}, mode="json")
    targets = spec.model.lora.model_dump(mode="json")["targets"]
    fleet = spec.fleet.model_dump(include={"availability", "device_files", "devices", "num_clients"}, mode="json")
    reads = spec.fleet.availability.path is not None or spec.fleet.device_files
    return json.dumps([base_key(spec), targets, data, spec.seed, fleet if reads else None], sort_keys=True)


Fetch = Callable[[str], Inputs | None]
MakeWorkers = Callable[[Problem], Executor]


class TrialRunner:
    """What stays in a process between trials."""

    def __init__(self, *, fetch: Fetch | None = None, make_workers: MakeWorkers | None = None):
        """``fetch``: inputs by key where somebody has loaded them already; ``make_workers``: the executor of a gang."""
        self._fetch, self._make_workers = fetch, make_workers
        self._inputs: dict[str, Inputs] = {}
        self._placed: dict[Any, tuple[BaseModel, dict[Any, Any]]] = {}
        """Base models where they are computed with, and the networks over each."""
        self._baselines: Baselines = {}

    def run(self, order: TrialOrder) -> Iterator[Event]:
        """The trial's rounds, from where its directory stands; a failure is tried once more from the last whole round.

        Events are the coordinator's, with ``over`` at the end: finished, or failed with its ``error``.
        """
        run_dir: RunDirectory | None = None
        try:
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
        """The rounds that are left; none where the one who should have been told of the end was killed."""
        if (run_dir.result() or {}).get("status") == "finished":
            yield {"kind": "end", "over": "finished"}
            return
        set_threads(int(problem.spec.execution.threads))
        try:
            yield from self._attempt(problem, run_dir)
        except Exception:
            self._placed.clear()  # whatever state the failure left the networks in
            yield from self._attempt(problem, run_dir)

    def _attempt(self, problem: Problem, run_dir: RunDirectory) -> Iterator[Event]:
        event: Event = {}
        for event in Coordinator(problem, self._executor(problem), run_dir, baselines=self._baselines).run():
            if event["kind"] == "round" and event["round"] < event["num_rounds"]:  # the last one is told with the end
                yield event
        finish(run_dir, event)
        yield {**event, "over": "finished"}

    def inputs(self, spec: RunSpec) -> Inputs:
        """Model and data of a run."""
        key = inputs_key(spec)
        found = self._inputs.pop(key, None) or (self._fetch(key) if self._fetch else None)
        found = found or load_inputs(spec, base=self._base(spec))
        while len(self._inputs) >= MAX_INPUTS:
            del self._inputs[next(iter(self._inputs))]
        self._inputs[key] = found  # the last used stands last
        return found

    def _base(self, spec: RunSpec) -> BaseModel | None:
        """The base model, where one of the inputs that are kept has it."""
        mine = json.dumps(base_key(spec))
        return next((inputs.base for key, inputs in self._inputs.items() if key.startswith(f"[{mine},")), None)

    def _executor(self, problem: Problem) -> Executor:
        if problem.spec.execution.kind == "ray" and self._make_workers is not None:
            return self._make_workers(problem)
        spec = problem.spec
        key = (problem.inputs.base.key, spec.execution.device, spec.execution.precision)
        kept = self._placed.pop(key) if key in self._placed else (placed_base(spec, problem.inputs.base), {})
        while len(self._placed) >= MAX_PLACED:
            del self._placed[next(iter(self._placed))]
        self._placed[key] = kept  # the last used stands last
        executor = SerialExecutor(problem, base=kept[0])
        executor.process.worker.adopt(kept[1].setdefault(spec.model.lora, {}))
        return executor

    def _directory(self, order: TrialOrder, problem: Problem) -> RunDirectory:
        if (order.run_path / RunDirectory.SPEC).is_file():
            begun = RunDirectory.open(order.run_path)
            check_content(problem.spec, begun.meta.get("content"), problem.inputs.content, run=str(order.run_path))
            return begun
        meta = {**run_meta(problem), **order.meta}
        return RunDirectory.create(order.workspace, order.run_id, problem.spec.to_dict(), meta=meta)
