"""Executors carry out work units and evaluations; replies come in the order of the units. The serial one, and the interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fleetune.engine.execution.work_units import WorkUnit, WorkUnitReply
from fleetune.engine.execution.worker_process import WorkerProcess
from fleetune.errors import RunFailed
from fleetune.methods.base import GlobalModel, Payload
from fleetune.models.base import BaseModel
from fleetune.problem import Problem
from fleetune.training.evaluate import EvalSums


class Executor(Protocol):
    """Carries out local updates and evaluations: here one after the other, or on workers at the same time."""

    def run(self, units: Sequence[WorkUnit], payloads: Mapping[int, Payload]) -> Iterator[WorkUnitReply]:
        """Begin the units; replies come in their order. A real failure is retried once, then raised as RunFailed."""
        ...

    def evaluate(self, model: GlobalModel, chunks: Sequence[np.ndarray]) -> Evaluation:
        """Begin an evaluation. It may go on beside units that come later.

        ``chunks``: row numbers among the held-out examples, (n,) int each; how they are cut decides the order of the sums.
        """
        ...


class Evaluation(Protocol):
    """An evaluation that was begun."""

    def is_done(self) -> bool:
        """True if `sums` would not wait."""
        ...

    def sums(self) -> list[EvalSums]:
        """The sums over each chunk, in order; waits for them. Raises RunFailed if the evaluation failed."""
        ...


@dataclass(frozen=True)
class CompletedEvaluation:
    """An evaluation that was carried out at once."""

    parts: list[EvalSums]
    """One per chunk, in order."""

    def is_done(self) -> bool:
        """True."""
        return True

    def sums(self) -> list[EvalSums]:
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

    def evaluate(self, model: GlobalModel, chunks: Sequence[np.ndarray]) -> CompletedEvaluation:
        """One chunk after the other."""
        return CompletedEvaluation([self._evaluate_one(model, rows) for rows in chunks])

    def _evaluate_one(self, model: GlobalModel, rows: np.ndarray) -> EvalSums:
        try:
            return self.process.evaluate(model, rows)
        except Exception as error:
            if self.debug:
                raise
            raise RunFailed(f"evaluation: {type(error).__name__}: {error}") from error
