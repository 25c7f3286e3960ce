"""Runs of the tiny world inside this process: what a finished run left behind, and what went over the seam meanwhile."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fleetune.engine.checkpoint.checkpoint import Checkpoint
from fleetune.engine.checkpoint.client_store import slot_of
from fleetune.engine.coordinator import Coordinator, Event
from fleetune.engine.execution.executor import Evaluation, Executor, OwnChunk, SerialExecutor
from fleetune.engine.execution.work_units import WorkUnit, WorkUnitReply
from fleetune.engine.round.serving import serve
from fleetune.methods.base import GlobalModel, Payload, Report, ServerWork, State
from fleetune.models.config import ModelConfig
from fleetune.models.load import load_base
from fleetune.problem import Inputs, Problem, build_problem, load_inputs
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec
from fleetune.tensors import Packed, Tensors
from fleetune.training.evaluate import EvalSums
from fleetune.training.worker import Worker

MakeExecutor = Callable[[Problem], Executor]


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    problem: Problem
    run_dir: RunDirectory
    state: State
    private: dict[int, Tensors]
    events: list[Event]

    @property
    def rounds(self) -> pd.DataFrame:
        """Rows of rounds.parquet, all that must be the same for the same spec."""
        return self.run_dir.rounds().drop(columns="wall_seconds")

    @property
    def clients(self) -> pd.DataFrame:
        """Rows of clients.parquet, all that must be the same for the same spec."""
        return self.run_dir.clients().drop(columns="wall_seconds")

    @property
    def personal(self) -> pd.DataFrame:
        """Rows of personal.parquet."""
        return self.run_dir.personal()

    @property
    def deployed(self) -> GlobalModel:
        """The model that the run ships."""
        checkpoint = Checkpoint(self.run_dir.path / "checkpoint", self.problem.fleet.num_clients)
        checkpoint.load()
        sizes = np.diff(self.problem.partition.offsets)
        return self.problem.method.deployed(self.state, lambda: checkpoint.all_private(sizes))


@functools.cache
def base_model(folder: str, quantization: str) -> Any:
    """One base model for all tests: it never changes."""
    return load_base(ModelConfig(base=folder, quantization=quantization))


def inputs(spec: RunSpec) -> Inputs:
    """Model and data of a spec."""
    return load_inputs(spec, base=base_model(spec.model.base, spec.model.quantization))


def problem(spec: RunSpec) -> Problem:
    """All that a run works on."""
    return build_problem(spec, inputs(spec))


def worker(of: Problem) -> Worker:
    """A worker for calls of `local_update` without an engine around it."""
    spec = of.spec
    return Worker(base=of.inputs.base, lora=spec.model.lora, local=spec.local, data=of.inputs.train)


def begun(of: Problem, state: State, round_idx: int) -> State:
    """The state with which a round's clients begin: after its stage's beginning and the server's own work."""
    state = of.method.begin_round(state, round_idx, Report(0.0))
    at = worker(of)
    carry_out = functools.partial(of.method.serve, at)
    return serve(of.method, state, round_idx, carry_out=carry_out, price=lambda work: (0.0, 0.0))[0]


def run(
    spec: RunSpec,
    executor: MakeExecutor = SerialExecutor,
    *,
    folder: Path | None = None,
    stop_after: int | None = None,
) -> Finished:
    """Run in this process; ``folder`` may hold a run that was stopped, which then goes on.

    ``stop_after=n`` breaks off once n rounds are recorded, as a kill between two rounds does.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="tiny-run-"))
    slot = folder / "runs" / "tiny"
    run_dir = RunDirectory.open(slot) if slot.exists() else RunDirectory.create(folder, "tiny", spec.to_dict())
    made = problem(spec)
    events: list[Event] = []
    with contextlib.closing(Coordinator(made, executor(made), run_dir).run()) as stream:  # type: ignore[type-var]
        for event in stream:
            events.append(event)
            if sum(e["kind"] == "round" for e in events) == stop_after:
                break
    return finished(made, run_dir, events)


def finished(made: Problem, run_dir: RunDirectory, events: list[Event]) -> Finished:
    """Read a run's state back from its checkpoint."""
    checkpoint = Checkpoint(run_dir.path / "checkpoint", made.fleet.num_clients)
    saved = checkpoint.load()
    assert saved is not None, "no round was finished"
    private = {c: tensors for c, _, tensors in checkpoint.all_private(np.diff(made.partition.offsets))}
    return Finished(made, run_dir, saved[0], private, events)


@dataclass(frozen=True)
class Passed:
    """One unit as it crossed the seam: what was sent with it, and what came back."""

    unit: WorkUnit
    payloads: dict[int, Payload]
    reply: WorkUnitReply
    partial_sum: Packed | None
    given: dict[int, Packed]
    """What its clients had kept before."""
    kept: dict[int, Packed]
    """What they keep afterwards."""


@dataclass
class Recorder:
    """An executor that notes what passes through it."""

    inner: Executor
    passed: list[Passed] = field(default_factory=list)

    def run(self, units: Sequence[WorkUnit], payloads: Mapping[int, Payload]) -> Iterator[WorkUnitReply]:
        """Pass on and note. The coordinator lets a reply's tensors go, so the sum is kept apart."""
        given = [dict(unit.store.read(unit.slots)) for unit in units]
        for unit, reply in zip(units, self.inner.run(units, payloads), strict=True):
            slot = slot_of(unit.round_idx, unit.index)
            kept = dict(unit.store.read(dict.fromkeys(reply.client_ids[reply.keeps].tolist(), slot)))
            self.passed.append(Passed(unit, dict(payloads), reply, reply.partial_sums.get(0), given[unit.index], kept))
            yield reply

    def serve(self, work: ServerWork) -> Tensors:
        """Pass on."""
        return self.inner.serve(work)

    def evaluate(self, model: GlobalModel, chunks: Sequence[np.ndarray]) -> Evaluation[EvalSums]:
        """Pass on."""
        return self.inner.evaluate(model, chunks)

    def evaluate_clients(self, chunks: Sequence[OwnChunk]) -> Evaluation[list[EvalSums]]:
        """Pass on."""
        return self.inner.evaluate_clients(chunks)


def recorded(spec: RunSpec) -> tuple[Finished, list[Passed]]:
    """A run, and all that crossed the seam."""
    recorders: list[Recorder] = []

    def make(of: Problem) -> Executor:
        recorders.append(Recorder(SerialExecutor(of)))
        return recorders[0]

    done = run(spec, make)
    return done, recorders[0].passed


def same_tensors(a: Tensors, b: Tensors) -> None:
    """The same names and the same bits."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"bits differ in {different[:3]}"


def close_tensors(a: Tensors, b: Tensors, *, rtol: float = 0.0, atol: float = 1e-6) -> None:
    """The same names, and values within a tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=functools.partial("{}: {}".format, name))


def same_runs(a: Finished, b: Finished) -> None:
    """State, private tensors and records are the same, bit for bit."""
    same_tensors(a.state.tensors, b.state.tensors)
    assert a.state.values == b.state.values
    assert a.private.keys() == b.private.keys()
    for client in a.private:
        same_tensors(a.private[client], b.private[client])
    pd.testing.assert_frame_equal(a.rounds, b.rounds, check_exact=True)
    pd.testing.assert_frame_equal(a.clients, b.clients, check_exact=True)
    pd.testing.assert_frame_equal(a.personal, b.personal, check_exact=True)
