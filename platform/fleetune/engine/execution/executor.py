"""Executors carry out work units and evaluations; replies come in the order of the units. The serial one, and the interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np

from fleetune.engine.execution.work_units import WorkUnit, WorkUnitReply
from fleetune.engine.execution.worker_process import WorkerProcess
from fleetune.errors import RunFailed
from fleetune.methods.base import GlobalModel, Payload, ServerWork
from fleetune.models.base import BaseModel
from fleetune.problem import Problem
from fleetune.tensors import Tensors
from fleetune.training.evaluate import EvalSums

Sums = TypeVar("Sums")


@dataclass(frozen=True, eq=False)
class OwnChunk:
    """K clients that are evaluated together, each on examples of its own."""

    models: list[GlobalModel]
    """One for each client, which differ in their adapters' values alone; or a single one that all share."""
    rows: np.ndarray
    """(K, b) int: each client's examples, rows of the training examples; NO_EXAMPLE where a client has fewer."""


class Executor(Protocol):
    """Carries out local updates and evaluations: here one after the other, or on workers at the same time."""

    def run(self, units: Sequence[WorkUnit], payloads: Mapping[int, Payload]) -> Iterator[WorkUnitReply]:
        """Begin the units; replies come in their order. A real failure is retried once, then raised as RunFailed."""
        ...

    def serve(self, work: ServerWork) -> Tensors:
        """Carry out a piece of the server's own work, and wait for it. A failure is retried once, then raised as RunFailed."""
        ...

    def evaluate(self, model: GlobalModel, chunks: Sequence[np.ndarray]) -> Evaluation[EvalSums]:
        """Begin an evaluation. It may go on beside units that come later.

        ``chunks``: row numbers among the held-out examples, (n,) int each; how they are cut decides the order of the sums.
        """
        ...

    def evaluate_clients(self, chunks: Sequence[OwnChunk]) -> Evaluation[list[EvalSums]]:
        """Begin an evaluation of clients' own models: for each chunk the sums of each of its clients."""
        ...


class Evaluation(Protocol[Sums]):
    """An evaluation that was begun."""

    def is_done(self) -> bool:
        """True if `sums` would not wait."""
        ...

    def sums(self) -> list[Sums]:
        """The sums over each chunk, in order; waits for them. Raises RunFailed if the evaluation failed."""
        ...


@dataclass(frozen=True)
class CompletedEvaluation(Generic[Sums]):
    """An evaluation that was carried out at once."""

    parts: list[Sums]
    """One per chunk, in order."""

    def is_done(self) -> bool:
        """True."""
        return True

    def sums(self) -> list[Sums]:
        """The sums over each chunk."""
        return self.parts


class SerialExecutor:
    """Everything in this process, in order; breakpoints work. ``debug`` lets exceptions through as they are."""

    def __init__(self, problem: Problem, *, debug: bool = False, base: BaseModel | None = None):
        """``base``: as for `WorkerProcess`."""
        self.process = WorkerProcess(problem.spec, problem.inputs, problem.method, base=base)
        self.debug = debug

    def run(self, units: Sequence[WorkUnit], payloads: Mapping[int, Payload]) -> Iterator[WorkUnitReply]:
        """One unit after the other."""
        for unit in units:
            yield self._run_one(unit, payloads)

    def _run_one(self, unit: WorkUnit, payloads: Mapping[int, Payload]) -> WorkUnitReply:
        try:
            return self.process.run(unit, payloads)
        except Exception:
            if self.debug:
                raise
            # The second try cures a failure that passes; with `locate`, one that stays names its client.
            return self.process.run(unit, payloads, locate=True)

    def serve(self, work: ServerWork) -> Tensors:
        """In this process, tried once more if it fails."""
        try:
            return self.process.serve(work)
        except Exception:
            if self.debug:
                raise
        try:
            return self.process.serve(work)
        except Exception as error:
            raise RunFailed(f"the server's own work: {type(error).__name__}: {error}") from error

    def evaluate(self, model: GlobalModel, chunks: Sequence[np.ndarray]) -> CompletedEvaluation[EvalSums]:
        """One chunk after the other."""
        return CompletedEvaluation([self._evaluated(partial(self.process.evaluate, model, rows)) for rows in chunks])

    def evaluate_clients(self, chunks: Sequence[OwnChunk]) -> CompletedEvaluation[list[EvalSums]]:
        """One chunk after the other."""
        return CompletedEvaluation([
            self._evaluated(partial(self.process.evaluate_clients, chunk.models, chunk.rows)) for chunk in chunks
        ])  # fmt: skip

    def _evaluated(self, evaluate: Callable[[], Sums]) -> Sums:
        try:
            return evaluate()
        except Exception as error:
            if self.debug:
                raise
            raise RunFailed(f"evaluation: {type(error).__name__}: {error}") from error
