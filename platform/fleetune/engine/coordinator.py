"""The round loop, the same for every method. A plain class; on Ray it lives in an actor."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fleetune.engine.checkpoint import Checkpoint, Progress
from fleetune.engine.columns import client_columns, round_row
from fleetune.engine.executor import Executor
from fleetune.engine.lots import LotReply, make_lots
from fleetune.engine.problem import Problem
from fleetune.engine.rounds import LATE, OK, Outcome
from fleetune.engine.schedule import Schedule, Work
from fleetune.methods.base import State, Update
from fleetune.records.run_directory import RunDirectory
from fleetune.tensors import Packed
from fleetune.training.evaluate import totals

Event = dict[str, Any]
Baselines = dict[str, dict[str, float]]


class Coordinator:
    """Runs a problem's rounds on an executor and writes what happened to the run directory."""

    def __init__(
        self, problem: Problem, executor: Executor, run_dir: RunDirectory, *, baselines: Baselines | None = None
    ):
        self.problem, self.executor, self.run_dir = problem, executor, run_dir
        self.baselines = baselines if baselines is not None else {}
        self.spec, self.method = problem.spec, problem.method
        self.schedule = Schedule(problem)
        self.checkpoint = Checkpoint(run_dir.path / "checkpoint", problem.fleet.num_clients)
        self.sizes = self.schedule.sizes

    def run(self) -> Iterator[Event]:
        """All rounds that are left. Yields an event when the run starts, after each round, and at its end."""
        state, progress = self._start()
        yield self._event("start", progress)
        for round_idx in range(progress.next_round, self.spec.rounds.num_rounds):
            started = time.perf_counter()

            # What the server sends, to whom, and what it costs each of them; so who is refused, leaves, or comes too late.
            state = self.method.begin_round(state, round_idx)
            now = self.schedule.round(state, round_idx, self.checkpoint.provisioned)
            client_ids, work, costs, outcome = now.client_ids, now.work, now.costs, now.outcome

            # The work itself, and the new state.
            replies: list[LotReply] = []
            state = self._update(state, client_ids, work, outcome, replies)
            progress.sim_seconds += outcome.sim_seconds

            # Evaluation, records, checkpoint.
            clients = client_columns(self.problem, client_ids, costs, outcome, replies, work.rows)
            row = round_row(round_idx, self.method.stage(round_idx), clients, outcome, progress.sim_seconds)
            row.update(self.method.columns(state))
            if self._is_evaluated(round_idx):
                row.update(self._evaluate(state))
            row["wall_seconds"] = time.perf_counter() - started
            self._record(state, row, clients, replies, progress)
            yield self._event("round", progress, row)
        yield self._finish(state, progress)

    # -- start and end ----------------------------------------------------------------------------------------------------
    def _start(self) -> tuple[State, Progress]:
        saved = self.checkpoint.load()
        if saved is not None:
            self.run_dir.truncate(saved[1].next_round)
            return saved
        self.run_dir.truncate(0)
        state = self.method.start()
        progress = Progress(baseline=self._baseline(state))
        self.run_dir.update_meta(baseline=progress.baseline)
        return state, progress

    def _finish(self, state: State, progress: Progress) -> Event:
        from fleetune.models.peft_format import save_adapter

        model = self.method.deployed(state, self._private_states)
        save_adapter(self.run_dir.path / "adapter", model, self.problem.inputs.base, self.spec.model.lora)
        self.run_dir.consolidate()
        rows = self.run_dir.round_rows(first_round=self.spec.rounds.num_rounds - 1)
        return self._event("end", progress, rows[-1][0] if rows else {})

    # -- parts of a round -------------------------------------------------------------------------------------------------
    def _update(
        self, state: State, client_ids: np.ndarray, work: Work, outcome: Outcome, replies: list[LotReply]
    ) -> State:
        """Carry out the work of the clients that count (late ones too, where they keep something) and aggregate it."""
        keeps = self._keeps(work)
        active = np.flatnonzero((outcome.status == OK) | ((outcome.status == LATE) & keeps))
        if not (outcome.status == OK).any():
            return state
        sizes = self.sizes[client_ids].astype(float)
        counted = sizes * (outcome.status == OK)
        weights = counted / counted.sum()
        ids = client_ids[active]
        lots = make_lots(
            round_idx=work.round_idx,
            stage=self.method.stage(work.round_idx),
            run_seed=self.spec.seed,
            client_ids=ids,
            weights=weights[active],
            payloads=work.group_of[active],
            rows=[work.rows[i] for i in active],
            learning_rate=self.spec.local.learning_rate_at(work.round_idx, self.spec.rounds.num_rounds),
            cohort_size=int(self.spec.execution.cohort),
            coupled=self.method.coupled,
            private=self.checkpoint.private(ids) if keeps else {},
        )
        run = self.executor.run(lots, dict(enumerate(work.payloads)))
        stream = self._updates(run, work, weights, client_ids, replies)
        state = self.method.aggregate(state, stream, work.round_idx)
        for _ in stream:  # a method that does not look at every update still needs every client's record
            pass
        return state

    def _updates(
        self,
        stream: Iterable[LotReply],
        work: Work,
        weights: np.ndarray,
        client_ids: np.ndarray,
        replies: list[LotReply],
    ) -> Iterator[Update]:
        """Lots become updates one by one; their tensors are let go as soon as they are added."""
        place = {client_id: i for i, client_id in enumerate(client_ids.tolist())}
        for reply in stream:
            counted = [i for i in (place[int(c)] for c in reply.client_ids) if weights[i] > 0]
            server = reply.server.unpack() if reply.server is not None else {}
            for key in sorted({int(work.group_of[i]) for i in counted}):
                mine = [i for i in counted if work.group_of[i] == key]
                ids = tuple(client_ids[mine].tolist())
                group, share = work.groups[key], float(weights[mine].sum())
                if key in reply.partial_sums or server:
                    packed = reply.partial_sums.get(key)
                    yield Update(packed.unpack() if packed else {}, 1.0, ids, server, group, share)
                    server = {}
                for i, client_id in zip(mine, ids, strict=True):
                    if client_id in reply.each:
                        weight = float(weights[i])
                        yield Update(reply.each[client_id].unpack(), weight, (client_id,), {}, group, weight)
            reply.partial_sums, reply.server, reply.each = {}, None, {}
            replies.append(reply)

    def _keeps(self, work: Work) -> bool:
        """Whether clients of this work keep something of their own for the next time."""
        plans = ((self.method.plan(payload), payload) for payload in work.payloads)
        return any(plan.keeps(name) for plan, payload in plans for name in self.method.client_adapter(payload))

    # -- records ----------------------------------------------------------------------------------------------------------
    def _evaluate(self, state: State) -> dict[str, float]:
        """Loss and accuracy of the global model on the held-out examples, in chunks that any worker can take."""
        num_examples = len(self.problem.inputs.evaluation.data)
        size = self.spec.evaluation.batch_size
        chunks = [np.arange(start, min(start + size, num_examples)) for start in range(0, num_examples, size)]
        return totals(self.executor.evaluate(self.method.evaluated(state, self._private_states), chunks))

    def _baseline(self, state: State) -> dict[str, float]:
        """The untrained model's quality. With B = 0 it is the base model's, so runs on one base and data share it."""
        model = self.method.evaluated(state, self._private_states)
        is_base = model.submodel.is_whole(self.problem.inputs.base.num_layers) and not any(
            tensor.any() for name, tensor in model.adapter.items() if name.endswith(".lora_B")
        )
        if not is_base:
            return self._evaluate(state)
        spec = self.spec
        data = spec.data.model_dump_json(exclude={"partition"})
        key = (
            f"{spec.model.base} {spec.model.quantization} {data} {spec.evaluation} {spec.seed} {spec.execution.threads}"
        )
        if key not in self.baselines:
            self.baselines[key] = self._evaluate(state)
        return self.baselines[key]

    def _private_states(self) -> Iterator[tuple[int, int, Any]]:
        return self.checkpoint.all_private(self.sizes)

    def _is_evaluated(self, round_idx: int) -> bool:
        return (round_idx + 1) % self.spec.evaluation.every == 0 or round_idx + 1 == self.spec.rounds.num_rounds

    def _record(
        self, state: State, row: Event, clients: dict[str, Any], replies: list[LotReply], progress: Progress
    ) -> None:
        """Records first, then the clients' private tensors, then the state: what a kill leaves behind can be gone on from."""
        round_idx = int(row["round"])
        self.run_dir.append_round(row, clients)
        private: dict[int, Packed] = {}
        for reply in replies:
            private.update(reply.private)
        self.checkpoint.keep(round_idx, private)
        progress.next_round = round_idx + 1
        for name in (
            "uplink_bytes",
            "downlink_bytes",
            "energy_joules",
            "wall_seconds",
            "num_oom",
            "num_dropped",
            "num_late",
        ):
            progress.totals[name] = progress.totals.get(name, 0.0) + float(row[name])
        self.checkpoint.save(state, progress)
        self.checkpoint.forget_unneeded()

    def _event(self, kind: str, progress: Progress, row: Event | None = None) -> Event:
        return {
            "kind": kind,
            "round": progress.next_round,
            "num_rounds": self.spec.rounds.num_rounds,
            "row": row or {},
            "baseline": progress.baseline,
            "sim_seconds": progress.sim_seconds,
            "execution": self.spec.execution.model_dump(),
            "totals": dict(progress.totals),
        }
