"""The round loop, the same for every method. A plain class; on Ray it lives in an actor."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fleetune import files
from fleetune.columns import ROUND_COLUMNS, names
from fleetune.engine.checkpoint.checkpoint import Checkpoint, Progress
from fleetune.engine.checkpoint.client_store import slot_of
from fleetune.engine.divergence import Diverged, check_progress, marked, settled
from fleetune.engine.execution.executor import Executor
from fleetune.engine.execution.work_units import WorkUnitReply, make_work_units
from fleetune.engine.pending_rounds import FinishedRound, PendingQuality, PendingRounds
from fleetune.engine.round.planner import RoundPlan, RoundPlanner
from fleetune.engine.round.ranks import filled, weight_per_row
from fleetune.engine.round.rules import FAILED, LATE, OK
from fleetune.engine.round.work import Work
from fleetune.engine.rows import client_columns, round_row
from fleetune.errors import RunFailed
from fleetune.methods.base import GlobalModel, State, Update
from fleetune.problem import Problem
from fleetune.records.run_directory import RunDirectory
from fleetune.tensors import Tensors

Event = dict[str, Any]
Baselines = dict[str, PendingQuality]
TOTALS = names(ROUND_COLUMNS, "sum")


class Coordinator:
    """Runs a problem's rounds on an executor and writes what happened to the run directory."""

    def __init__(
        self, problem: Problem, executor: Executor, run_dir: RunDirectory, *, baselines: Baselines | None = None
    ):
        self.problem, self.executor, self.run_dir = problem, executor, run_dir
        self.baselines = baselines if baselines is not None else {}
        self.spec, self.method = problem.spec, problem.method
        self.planner = RoundPlanner(problem)
        self.checkpoint = Checkpoint(run_dir.path / "checkpoint", problem.fleet.num_clients)
        self.pending = PendingRounds(run_dir, self.checkpoint)
        self.sizes = self.planner.sizes

    def run(self) -> Iterator[Event]:
        """All rounds that are left. Yields an event when the run starts, when a round is on record, and at the end."""
        state, progress = self._start()
        yield self._event("start", progress)
        try:
            for round_idx in range(progress.next_round, self.spec.rounds.num_rounds):
                self._check(state, progress)
                started = time.perf_counter()

                # What the server sends, to whom, and what it costs each of them; so who is refused, leaves, or comes too late.
                state = self.method.begin_round(state, round_idx)
                now = self.planner.round(
                    state,
                    round_idx,
                    self.checkpoint.provisioned,
                    self.checkpoint.busy_until,
                    sim_seconds=progress.sim_seconds,
                )
                progress.sim_seconds = now.start_seconds + now.outcome.sim_seconds

                # The work itself. While workers are at it, the round before is written and the next one's batches are drawn.
                replies: list[WorkUnitReply] = []
                updates = self._begin(now, replies)
                yield from self._written()
                self.planner.draw_ahead(round_idx + 1, self.checkpoint.busy_until, sim_seconds=progress.sim_seconds)
                state, now = self._aggregate(state, now, updates, replies)

                # What there is to record, and the evaluation, which goes on beside the next round's work.
                clients = client_columns(self.problem, now, replies)
                row = round_row(self.method.stage(round_idx), now, clients, progress.sim_seconds)
                row.update(self.method.columns(state))
                evaluation = self._evaluate_round(state) if self._is_evaluated(round_idx) else None
                row["wall_seconds"] = time.perf_counter() - started
                _count(progress, row)
                self.pending.add(FinishedRound(row, clients, self.checkpoint.snapshot(state, progress), evaluation))
            yield from self._written(everything=True)
            self._check(state, progress)
        except RunFailed:
            # Rounds that were done before go on record, if their evaluation and the disk let them.
            with contextlib.suppress(RunFailed, OSError):
                yield from self._written(everything=True)
            raise
        except KeyboardInterrupt:
            with contextlib.suppress(RunFailed, OSError):
                for _ in self._written():  # nobody is told any more
                    pass
            raise
        finally:
            self.pending.close()
        yield self._finish(state, progress)

    # -- start and end ----------------------------------------------------------------------------------------------------
    def _start(self) -> tuple[State, Progress]:
        saved = self.checkpoint.load(self.run_dir.check_rounds)
        # A round is recorded once the state after the one before is written, so without any state there is one at most.
        if saved is None and self.run_dir.num_recorded() > 1:
            raise files.damaged(self.checkpoint.state_file, "it is missing", holds="the run's state")
        if saved is not None:
            self.run_dir.truncate(saved[1].next_round)
            self.pending.baseline = saved[1].baseline
            if not saved[1].baseline:
                self.pending.expect_baseline(self._baseline(self.method.start()))
            return saved
        self.run_dir.truncate(0)
        state = self.method.start()
        self.pending.expect_baseline(self._baseline(state))
        return state, Progress()

    def _written(self, *, everything: bool = False) -> Iterator[Event]:
        """Rounds that go on record now."""
        for done in self.pending.write(everything=everything):
            yield self._event("round", done.progress, done.row)

    def _check(self, state: State, progress: Progress) -> None:
        """RunFailed where clients do nothing but diverge; what they had learnt before is shipped all the same."""
        try:
            check_progress(progress, self.spec.rounds.num_rounds)
        except RunFailed:
            if progress.totals["num_ok"]:
                self._ship(state)
            raise

    def _ship(self, state: State) -> None:
        from fleetune.models.peft_format import save_adapter

        model = self.method.deployed(state, self._private_states)
        save_adapter(self.run_dir.path / "adapter", model, self.problem.inputs.base, self.spec.model.lora)

    def _finish(self, state: State, progress: Progress) -> Event:
        self._ship(state)
        self.run_dir.consolidate()
        rows = self.run_dir.round_rows(first_round=self.spec.rounds.num_rounds - 1)
        return self._event("end", progress, rows[-1][0] if rows else {})

    # -- parts of a round -------------------------------------------------------------------------------------------------
    def _begin(self, now: RoundPlan, replies: list[WorkUnitReply]) -> Iterator[Update] | None:
        """Begin the work of the clients that count (late ones too, where they keep something); None where none does."""
        client_ids, work, outcome = now.client_ids, now.work, now.outcome
        keeps = self._keeps(work)
        active = np.flatnonzero((outcome.status == OK) | ((outcome.status == LATE) & keeps))
        if not len(active):
            return None
        sizes = self.sizes[client_ids].astype(float)
        counted = sizes * (outcome.status == OK)
        weights = counted / (counted.sum() or 1.0)
        ids = client_ids[active]
        units = make_work_units(
            round_idx=work.round_idx,
            stage=self.method.stage(work.round_idx),
            run_seed=self.spec.seed,
            client_ids=ids,
            weights=weights[active],
            payloads=work.payload_of[active],
            rows=[work.rows[i] for i in active],
            learning_rate=self.spec.local.learning_rate_at(work.round_idx, self.spec.rounds.num_rounds),
            cohort_size=int(self.spec.execution.cohort),
            coupled=self.spec.method.coupled,
            ranks=work.of_clients("rank")[active],
            store=self.checkpoint.store,
            slots=self.checkpoint.slots_of(ids) if keeps else {},
        )
        run = self.executor.run(units, dict(enumerate(work.payloads)))
        return self._updates(run, work, weights, client_ids, replies)

    def _aggregate(
        self, state: State, now: RoundPlan, updates: Iterator[Update] | None, replies: list[WorkUnitReply]
    ) -> tuple[State, RoundPlan]:
        """The next state from the updates as they come, and the round with those as failed who diverged.

        Where one of them was counted on, the others' work is done again without it (`engine.divergence`).
        """
        while updates is not None:
            first, after = len(replies), state
            try:
                if (now.outcome.status == OK).any():
                    after = self.method.aggregate(state, updates, now.work.round_idx)
                for _ in updates:  # a method that does not look at every update still needs every client's record
                    pass
            except Diverged:
                now = marked(now, replies[first:])
                updates = self._begin(now, replies)
                continue
            state, now = settled(marked(now, replies[first:]), state, after)
            failed = now.client_ids[now.outcome.status == FAILED]
            for reply in replies[first:]:
                keep = reply.keeps & ~np.isin(reply.client_ids, failed)
                self.checkpoint.kept(now.work.round_idx, reply.index, reply.client_ids[keep])
            break
        return state, now

    def _updates(
        self,
        stream: Iterable[WorkUnitReply],
        work: Work,
        weights: np.ndarray,
        client_ids: np.ndarray,
        replies: list[WorkUnitReply],
    ) -> Iterator[Update]:
        """Turn the replies of work units into updates, one after the other; ``weights`` and ``client_ids`` are (n,).

        The tensors of a reply are dropped as soon as the method has used them: those of a whole round would not fit.
        """
        place = {client_id: i for i, client_id in enumerate(client_ids.tolist())}
        full = self.spec.model.lora.rank
        ranks = np.where(weights > 0, work.of_clients("rank"), full)
        trained = weight_per_row(ranks, weights, full) if (ranks < full).any() else None
        has_diverged = False
        for reply in stream:
            counted = [i for i in (place[int(c)] for c in reply.client_ids) if weights[i] > 0]
            has_diverged |= any(weights[place[int(c)]] > 0 for c in reply.client_ids[reply.diverged])
            # Once a client that counts has diverged, the round's sums are not used (`Diverged`). The replies that are left still
            # say who else diverged, so they are read to the end, without updates.
            if has_diverged:
                counted = []
            # The server's own half (split learning) is one state for the whole unit, not one for each payload. A method adds up
            # what the updates say of it, so it rides on the unit's first update and on no other.
            server = reply.server.unpack() if reply.server is not None else {}
            for key in sorted({int(work.payload_of[i]) for i in counted}):
                members = [i for i in counted if work.payload_of[i] == key]
                ids = tuple(client_ids[members].tolist())
                group, total_weight = work.groups[key], float(weights[members].sum())
                if key in reply.partial_sums or server:
                    packed = reply.partial_sums.get(key)
                    total = self._at_full_size(packed.unpack(), work, key, total_weight, trained) if packed else {}
                    yield Update(total, 1.0, ids, server, group, total_weight)
                    server = {}
                for i, client_id in zip(members, ids, strict=True):
                    if client_id in reply.each:
                        weight = float(weights[i])
                        upload = self._at_full_size(reply.each[client_id].unpack(), work, key, 1.0, trained)
                        yield Update(upload, weight, (client_id,), {}, group, weight)
            if reply.private:  # a worker with access to the store has written them there itself
                self.checkpoint.store.write(slot_of(work.round_idx, reply.index), reply.private)
            reply.let_go()
            replies.append(reply)
        if has_diverged:
            raise Diverged

    def _at_full_size(
        self, upload: Tensors, work: Work, key: int, total_weight: float, trained: np.ndarray | None
    ) -> Tensors:
        """An upload (or a sum of them) of clients with a smaller workload, at full depth and rank.

        ``total_weight``: the p_k that it has been multiplied by already. ``trained``: see `round.ranks.weight_per_row`; None if
        everybody trained all ranks.
        """
        source = work.source[key]
        if work.workloads[key].depth != work.workloads[source].depth:
            upload = self.method.grown(upload, work.payloads[key])
        if trained is None:
            return upload
        return filled(upload, work.payloads[source].tensors, total_weight=total_weight, trained=trained)

    def _keeps(self, work: Work) -> bool:
        """Whether clients of this work keep something of their own for the next time."""
        plans = ((self.method.local_plan(payload), payload) for payload in work.payloads)
        return any(plan.keeps(name) for plan, payload in plans for name in self.method.client_adapter(payload))

    # -- evaluation -------------------------------------------------------------------------------------------------------
    def _evaluate_round(self, state: State) -> PendingQuality:
        return self._evaluate(self.method.evaluated(state, self._private_states))

    def _evaluate(self, model: GlobalModel) -> PendingQuality:
        """Loss and accuracy of a model on the held-out examples, in chunks that any worker can take."""
        num_examples = len(self.problem.inputs.evaluation.data)
        size = self.spec.evaluation.batch_size
        chunks = [np.arange(start, min(start + size, num_examples)) for start in range(0, num_examples, size)]
        return PendingQuality(self.executor.evaluate(model, chunks))

    def _baseline(self, state: State) -> PendingQuality:
        """The untrained model's quality. With B = 0 it is the base model's, so runs on one base and data share it."""
        model = self.method.evaluated(state, lambda: iter(()))
        is_base = model.submodel.is_whole(self.problem.inputs.base.num_layers) and not any(
            tensor.any() for name, tensor in model.adapter.items() if name.endswith(".lora_B")
        )
        if not is_base:
            return self._evaluate(model)
        spec, inputs = self.spec, self.problem.inputs
        data = spec.data.model_dump_json(exclude={"partition"})
        products = spec.execution.model_dump(include={"threads", "device", "precision", "kernels"})
        read = sorted(pair for pair in inputs.content.items() if not pair[0].startswith("fleet."))
        key = f"{inputs.base.key} {read} {data} {spec.evaluation} {spec.seed} {products}"
        if key not in self.baselines or not self.baselines[key].is_done():  # that of a run that failed never comes
            self.baselines[key] = self._evaluate(model)
        return self.baselines[key]

    def _private_states(self) -> Iterator[tuple[int, int, Any]]:
        return self.checkpoint.all_private(self.sizes)

    def _is_evaluated(self, round_idx: int) -> bool:
        return (round_idx + 1) % self.spec.evaluation.every == 0 or round_idx + 1 == self.spec.rounds.num_rounds

    def _event(self, kind: str, progress: Progress, row: Event | None = None) -> Event:
        return {
            "kind": kind,
            "round": progress.next_round,
            "num_rounds": self.spec.rounds.num_rounds,
            "row": row or {},
            "baseline": self.pending.baseline,
            "sim_seconds": progress.sim_seconds,
            "execution": self.spec.execution.model_dump(),
            "totals": dict(progress.totals),
            "notes": self.checkpoint.notes if kind == "start" else [],
        }


def _count(progress: Progress, row: Event) -> None:
    """A round more, and what it added to the totals."""
    progress.next_round = int(row["round"]) + 1
    if row["num_ok"] or row["num_failed"]:
        progress.failed_rounds = 0 if row["num_ok"] else progress.failed_rounds + 1
    for name in TOTALS:
        progress.totals[name] = progress.totals.get(name, 0.0) + float(row[name])
