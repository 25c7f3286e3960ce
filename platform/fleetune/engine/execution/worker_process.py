"""The worker's half: it carries out work units and evaluates, in whichever process it lives.

The coordinator plans the units (`work_units`); the serial executor and the workers on Ray carry them out by `WorkerProcess`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from fleetune.engine.checkpoint.client_store import slot_of
from fleetune.engine.execution.work_units import WorkUnit, WorkUnitReply
from fleetune.engine.round.ranks import overlay
from fleetune.errors import RunFailed
from fleetune.methods.base import GlobalModel, Method, Payload, ServerWork
from fleetune.models.adapters import Axes
from fleetune.models.base import BaseModel, placed
from fleetune.problem import Inputs
from fleetune.spec import RunSpec
from fleetune.tensors import Packed, RunningSum, Stack, Tensors, add_weighted, all_finite, finite_rows, pack
from fleetune.training.device import set_up
from fleetune.training.evaluate import EvalSums, evaluate_clients, evaluate_rows
from fleetune.training.plan import ClientTask, CohortUpdate
from fleetune.training.worker import Worker


class WorkerProcess:
    """Carries out units and evaluations of one run, in the main process or in a worker on Ray."""

    def __init__(self, spec: RunSpec, inputs: Inputs, method: Method, *, base: BaseModel | None = None):
        """``base``: the base model as `placed_base` returns it, if this process has placed it before."""
        self.spec, self.inputs, self.method = spec, inputs, method
        set_up(spec.execution.device, spec.execution.kernels)
        self.worker = Worker(
            base=base or placed_base(spec, inputs.base),
            lora=spec.model.lora,
            local=spec.local,
            data=inputs.train,
            precision=spec.execution.precision,
        )

    def run(self, unit: WorkUnit, payloads: Mapping[int, Payload], *, locate: bool = False) -> WorkUnitReply:
        """Carry out one unit."""
        return run_work_unit(self.worker, self.method, payloads, unit, locate=locate)

    def serve(self, work: ServerWork) -> Tensors:
        """Carry out a piece of the server's own work."""
        return self.method.serve(self.worker, work)

    def evaluate(self, model: GlobalModel, rows: np.ndarray) -> EvalSums:
        """Evaluate on held-out examples; ``rows`` has their numbers, (n,) int."""
        config = self.spec.evaluation
        return evaluate_rows(
            self.worker.network(model.model),
            model.adapter,
            data=self.inputs.evaluation.data,
            responses=self.inputs.evaluation.responses,
            rows=rows,
            reader=self.inputs.reader,
            max_new_tokens=config.max_new_tokens if config.generate else None,
            num_answers=config.num_answers,
            answer_pattern=self.spec.data.answer_pattern,
            is_executed=self.spec.data.is_executed,
        )

    def evaluate_clients(self, models: Sequence[GlobalModel], rows: np.ndarray) -> list[EvalSums]:
        """Evaluate K clients on training examples that they hold out, ``rows`` (K, b); fields as of `OwnChunk`."""
        config = self.spec.evaluation
        return evaluate_clients(
            self.worker.network(models[0].model),
            [model.adapter for model in models],
            data=self.inputs.train,
            responses=self.inputs.responses,
            rows=rows,
            reader=self.inputs.reader,
            max_new_tokens=config.max_new_tokens if config.generate else None,
            answer_pattern=self.spec.data.answer_pattern,
        )


def placed_base(spec: RunSpec, base: BaseModel) -> BaseModel:
    """The base model on the device and in the precision of a spec."""
    return placed(base, device=spec.execution.device, precision=spec.execution.precision)


def run_work_unit(
    worker: Worker, method: Method, payloads: Mapping[int, Payload], unit: WorkUnit, *, locate: bool = False
) -> WorkUnitReply:
    """Carry out a unit. With ``locate`` an error is traced to its client by running the cohort's clients one by one."""
    n = len(unit.client_ids)
    reply = WorkUnitReply(
        unit.index,
        unit.client_ids,
        np.zeros(n),
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
        np.zeros((2, n), np.int64),
        np.zeros(n),
        np.zeros(n, bool),
        np.zeros(n, bool),
        has_store=unit.store.is_here,
    )
    totals: dict[int, RunningSum] = {}
    server: Tensors = {}
    new_private: dict[int, Packed] = {}
    for cohort in unit.cohorts:
        old_private = unit.read_private(cohort)
        tasks = unit.tasks(cohort, old_private, method.axes)
        started = time.perf_counter()
        try:
            update = _update(worker, method, payloads[cohort.payload], tasks)
        except Exception as error:
            if not locate:
                raise
            raise _located(error, worker, method, payloads[cohort.payload], tasks, unit) from error
        span = slice(cohort.start, cohort.stop)
        reply.wall_seconds[span] = (time.perf_counter() - started) / len(tasks)
        reply.losses[span], reply.num_tokens[span] = update.losses, update.num_tokens
        if update.cut_bytes is not None:
            reply.cut_bytes[:, span] = update.cut_bytes
        reply.diverged[span] = _diverged(update, coupled=method.traits.coupled)
        total = totals.setdefault(cohort.payload, RunningSum())
        _collect(reply, span, method, payloads[cohort.payload], update, tasks, total)
        if update.private is not None:
            reply.keeps[span] = ~reply.diverged[span]  # a client that diverged stays with its former private tensors
            private = _private_of(update.private, unit, span, tasks, old_private, method.axes)
            new_private.update({c: private[c] for c in unit.client_ids[span][reply.keeps[span]].tolist()})
        add_weighted(server, update.server, 1.0)
    # Cohorts were added in the unit's order, whoever carries it out, so the sums are the same bits on any worker.
    reply.partial_sums = {key: total.packed() for key, total in totals.items() if total}
    reply.server = pack(server) if server else None
    if not reply.has_store:
        reply.private = new_private
    elif new_private:
        # Written before the reply is sent, so whatever a reply points to is there. If this worker dies in between, the unit runs
        # again and writes the same file: its slot is that of the round and the unit, not of the attempt.
        unit.store.write(slot_of(unit.round_idx, unit.index), new_private)
    return reply


def _update(worker: Worker, method: Method, payload: Payload, tasks: list[ClientTask]) -> CohortUpdate:
    """One update for the cohort. With dropout its clients train one by one, as each draws masks of its own."""
    if len(tasks) == 1 or method.traits.coupled or not worker.lora.dropout:
        return method.local_update(worker, payload, tasks)
    return CohortUpdate.joined([method.local_update(worker, payload, [task]) for task in tasks])


def _diverged(update: CohortUpdate, *, coupled: bool) -> np.ndarray:
    """True for each client of the cohort whose work is not finite, (K,) bool.

    If clients share a server's half, one client's numbers spoil those of all. Then it is true only for the clients that came
    first; for all, if it cannot be found out who that was.
    """
    diverged = ~np.isfinite(update.losses)
    for stack in (update.upload, update.private):
        if stack is not None:
            diverged |= ~finite_rows(stack.data)
    if coupled and update.diverged_at is not None and np.isfinite(update.diverged_at).any():
        return update.diverged_at == update.diverged_at.min()
    if not diverged.any() and not all_finite(update.server.values()):
        return np.ones(len(diverged), bool)
    return diverged


def _collect(
    reply: WorkUnitReply,
    span: slice,
    method: Method,
    payload: Payload,
    update: CohortUpdate,
    tasks: list[ClientTask],
    total: RunningSum,
) -> None:
    """Add the cohort's uploads to the unit's sum, or put each into the reply; those of late clients (weight 0) are left out."""
    # The sum is made here and not by the coordinator: what travels is one upload per unit, however many clients it has.
    counted = [k for k, task in enumerate(tasks) if task.weight > 0]
    if update.upload is not None and update.upload.shapes:
        full = update.upload.data[0].nbytes
        reply.upload_bytes[span] = full if update.upload_bytes is None else update.upload_bytes
        if method.traits.partial_sums and counted:
            rows = update.upload if len(counted) == len(tasks) else update.upload.rows(counted)
            senders = [tasks[k] for k in counted]
            total.add(method.summand(payload, rows, senders), [task.weight for task in senders])
        elif not method.traits.partial_sums:
            reply.each.update({tasks[k].client_id: pack(update.upload.client(k)) for k in counted})


def _private_of(
    private: Stack, unit: WorkUnit, span: slice, tasks: list[ClientTask], old_private: Mapping[int, Tensors], axes: Axes
) -> dict[int, Packed]:
    """Client id -> its private tensors at full rank; what a smaller rank left out stays as it was."""
    packed = {}
    ranks = zip(unit.ranks[span].tolist(), unit.full_ranks[span].tolist(), strict=True)
    for k, (task, (rank, full_rank)) in enumerate(zip(tasks, ranks, strict=True)):
        tensors = private.client(k)
        if rank < full_rank:
            tensors = overlay(tensors, old_private.get(task.client_id, {}), full_rank, axes)
        packed[task.client_id] = pack(tensors)
    return packed


def _located(
    error: Exception, worker: Worker, method: Method, payload: Payload, tasks: list[ClientTask], unit: WorkUnit
) -> RunFailed:
    """An error that names the clients whose own work fails, or all of the cohort if it fails only together."""
    guilty = []
    for task in tasks:
        try:
            method.local_update(worker, payload, [task])
        except Exception:
            guilty.append(task.client_id)
    client_ids = guilty or [task.client_id for task in tasks]
    return RunFailed(
        f"{type(error).__name__}: {error}", round_idx=unit.round_idx, stage=unit.stage, client_ids=client_ids
    )
