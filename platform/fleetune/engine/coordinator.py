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
from fleetune.engine.evaluation import Baselines, Evaluator
from fleetune.engine.execution.executor import Executor
from fleetune.engine.execution.work_units import WorkUnitReply, make_work_units
from fleetune.engine.pending_rounds import FinishedRound, PendingQuality, PendingRounds
from fleetune.engine.personal_evaluation import PendingPersonal, PersonalEvaluator
from fleetune.engine.round.planner import RoundPlan, RoundPlanner
from fleetune.engine.round.ranks import filled, trained_rows
from fleetune.engine.round.rules import FAILED, LATE, OK
from fleetune.engine.round.serving import serve
from fleetune.engine.round.work import Work
from fleetune.engine.rows import client_columns, round_row
from fleetune.errors import RunFailed
from fleetune.methods.base import Report, State, Update
from fleetune.problem import Problem
from fleetune.records.run_directory import RunDirectory
from fleetune.tensors import Tensors

Event = dict[str, Any]
"""What the coordinator tells whoever started it: ``kind`` is ``start``, ``round`` (it is on record) or ``end``; see `_event`."""
TOTALS = names(ROUND_COLUMNS, "sum")


class Coordinator:
    """Runs a problem's rounds on an executor and writes what happened to the run directory."""

    def __init__(
        self, problem: Problem, executor: Executor, run_dir: RunDirectory, *, baselines: Baselines | None = None
    ):
        self.problem, self.executor, self.run_dir = problem, executor, run_dir
        self.spec, self.method = problem.spec, problem.method
        self.planner = RoundPlanner(problem)
        self.evaluator = Evaluator(problem, executor, baselines if baselines is not None else {})
        self.personal = PersonalEvaluator(problem, executor, self.planner)
        self.checkpoint = Checkpoint(run_dir.path / "checkpoint", problem.fleet.num_clients)
        self.pending = PendingRounds(run_dir, self.checkpoint)
        self.sizes = self.planner.sizes  # (num_clients,) int: n_k

    def run(self) -> Iterator[Event]:
        """All rounds that are left. Yields an event when the run starts, when a round is on record, and at the end."""
        self.personal.check()
        state, progress = self._start()
        yield self._event("start", progress)
        try:
            while not self._is_over(progress):
                round_idx = progress.next_round
                self._check(state, progress)
                if round_idx and self.method.stage(round_idx) != self.method.stage(round_idx - 1):
                    self._record_stage(state, round_idx - 1)
                started = time.perf_counter()

                # 1. Plan: a new stage, the server's own work, what it sends, to whom, and what it costs each; so who is refused,
                # leaves, or comes too late.
                if self.method.traits.waits:  # its report has the last round's quality, which may still be on its way
                    yield from self._written(everything=True)
                state, now = self._plan(state, round_idx, progress)
                progress.sim_seconds = now.start_seconds + now.outcome.sim_seconds

                # 2. Work. While workers are at it, the round before is written and the next one's batches are drawn.
                replies: list[WorkUnitReply] = []
                updates = self._begin(now, replies)
                yield from self._written()
                self.planner.draw_ahead(round_idx + 1, self.checkpoint.busy_until, sim_seconds=progress.sim_seconds)
                state, now = self._aggregate(state, now, updates, replies)

                # 3. Record. The evaluation goes on beside the next round's work; the round is written once it is there.
                clients = client_columns(self.problem, now, replies)
                serves = self.method.traits.serves
                row = round_row(self.method.stage(round_idx), now, clients, progress.sim_seconds, serves=serves)
                row.update(self.method.columns(state))
                evaluation, personal = self._evaluations(state, round_idx, progress.sim_seconds)
                row["wall_seconds"] = time.perf_counter() - started
                _count(progress, row)
                snapshot = self.checkpoint.snapshot(state, progress)
                self.pending.add(FinishedRound(row, clients, snapshot, evaluation, personal))
            yield from self._written(everything=True)
            self._check(state, progress)
        except RunFailed:
            # Rounds that were done before go on record, if their evaluation and the disk let them; a second failure on the way
            # would only hide the first.
            with contextlib.suppress(RunFailed, OSError):
                yield from self._written(everything=True)
            raise
        except KeyboardInterrupt:
            with contextlib.suppress(RunFailed, OSError):
                for _ in self._written():  # without waiting, and without events: whoever read them has gone
                    pass
            raise
        finally:
            self.pending.close()
        yield self._finish(state, progress)

    def _report(self, progress: Progress) -> Report:
        """What the server knows of the run so far; its quality only for a method that has waited for it."""
        return Report(progress.sim_seconds, dict(self.pending.quality) if self.method.traits.waits else {})

    # -- start and end ----------------------------------------------------------------------------------------------------
    def _start(self) -> tuple[State, Progress]:
        """The state and progress to go on from: the checkpoint's, or those of a new run."""
        saved = self.checkpoint.load(self.run_dir.check_rounds)
        # A round is recorded once the state after the one before is written, so without any state there is one at most. If there
        # are more, the state was lost: to begin anew in silence would cut those records off below.
        if saved is None and self.run_dir.num_recorded() > 1:
            raise files.damaged(self.checkpoint.state_file, "it is missing", holds="the run's state")
        if saved is not None:
            # Records are written before the state, so a kill between the two leaves a round on record that is done again.
            self.run_dir.truncate(saved[1].next_round)
            self.pending.baseline, self.pending.quality = saved[1].baseline, saved[1].quality
            if not saved[1].baseline:
                self._expect_baseline(self.method.start())
            return saved
        self.run_dir.truncate(0)
        state = self.method.start()
        self._expect_baseline(state)
        return state, Progress()

    def _expect_baseline(self, state: State) -> None:
        model = self.method.evaluated(state, lambda: iter(()))  # nobody has private tensors yet
        self.pending.expect_baseline(self.evaluator.untrained(model))

    def _written(self, *, everything: bool = False) -> Iterator[Event]:
        """Write the rounds that are ready, and make an event of each."""
        for done in self.pending.write(everything=everything):
            yield self._event("round", done.progress, done.row)

    def _check(self, state: State, progress: Progress) -> None:
        """Raises RunFailed if clients do nothing but diverge; what they had learnt before is shipped all the same."""
        try:
            check_progress(progress, self._num_rounds(progress))
        except RunFailed:
            if progress.totals["num_ok"]:
                self._ship(state)
            raise

    def _ship(self, state: State) -> None:
        """Write the run's adapter: in PEFT's format if it can hold it, else in our own."""
        from fleetune.models.peft_format import save_adapter

        model = self.method.deployed(state, self._private_states)
        save_adapter(self.run_dir.path / "adapter", model, self.problem.inputs.base, self.spec.model.lora)

    def _record_stage(self, state: State, last_round: int) -> None:
        """Write what the method keeps of the stage that ends with this round. A resumed run may write the same once more."""
        records = self.method.records(state)
        if records:
            self.run_dir.write_stage(self.method.stage(last_round), records)

    def _finish(self, state: State, progress: Progress) -> Event:
        self._record_stage(state, progress.next_round - 1)
        self._ship(state)
        self.run_dir.consolidate()
        rows = self.run_dir.round_rows(first_round=progress.next_round)
        return self._event("end", progress, rows[-1][0] if rows else {})

    # -- parts of a round -------------------------------------------------------------------------------------------------
    def _plan(self, state: State, round_idx: int, progress: Progress) -> tuple[State, RoundPlan]:
        """The state with which the round's clients begin, after the server's own work, and the plan of the round."""
        state = self.method.begin_round(state, round_idx, self._report(progress))
        price, carry_out = self.planner.pricing.server_work, self.executor.serve
        state, server = serve(self.method, state, round_idx, carry_out=carry_out, price=price)
        now = self.planner.round(
            state,
            round_idx,
            self.checkpoint.provisioned,
            self.checkpoint.busy_until,
            sim_seconds=progress.sim_seconds,
            server=server,
        )
        return state, now

    def _begin(self, now: RoundPlan, replies: list[WorkUnitReply]) -> Iterator[Update] | None:
        """Begin the work of the clients whose reply matters, and return their updates as they come; None if there are none.

        Those are the clients that count, and late ones if they keep private tensors: the device has trained them, and its next
        turn goes on from there, unless this one never began. All others were refused, left, or came too late, and simulating
        them would change nothing.
        ``replies`` receives every work unit's reply while the updates are read.
        """
        client_ids, work, outcome = now.client_ids, now.work, now.outcome
        keeps = self.method.traits.private
        active = np.flatnonzero((outcome.status == OK) | ((outcome.status == LATE) & keeps & now.begins))
        if not len(active):
            return None
        counted = self.sizes[client_ids].astype(float) * (outcome.status == OK)
        weights = counted / (counted.sum() or 1.0)  # (n,) float: p_k; all 0 if late clients alone work
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
            coupled=self.method.traits.coupled,
            ranks=work.of_clients("rank")[active],
            full_ranks=work.full_ranks()[active],
            store=self.checkpoint.store,
            slots=self.checkpoint.slots_of(ids) if keeps else {},
        )
        run = self.executor.run(units, dict(enumerate(work.payloads)))
        return self._updates(run, work, weights, client_ids, replies)

    def _aggregate(
        self, state: State, now: RoundPlan, updates: Iterator[Update] | None, replies: list[WorkUnitReply]
    ) -> tuple[State, RoundPlan]:
        """The next state from the updates as they come, and the round with those as failed who diverged.

        If one of them was counted on, the others' work is done again without it (`engine.divergence`). ``state`` is never changed
        in place, so what `Method.aggregate` made of the spoilt sums is simply dropped. Each repetition has fewer clients, so they
        come to an end. Replies of all attempts stay in ``replies``: the first ones tell what a failed client did.
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
                # The last attempt's slots count. Files of a spoilt one are written over, or no client's slot points to them.
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
        """Turn the replies of work units into updates, one after the other, in the units' order.

        ``weights`` and ``client_ids``: (n,), those of the round's clients; a reply knows its own by id. A generator, so that a
        reply's tensors are dropped as soon as the method has used them, and the next ones are unpacked only then: those of a full
        round would not fit into memory.
        """
        index_of = {client_id: i for i, client_id in enumerate(client_ids.tolist())}
        ranks = work.of_clients("rank")
        trained = trained_rows(work, weights)
        has_diverged = False
        for reply in stream:
            counted = [i for i in (index_of[int(c)] for c in reply.client_ids) if weights[i] > 0]
            has_diverged |= any(weights[index_of[int(c)]] > 0 for c in reply.client_ids[reply.diverged])
            # Once a client that counts has diverged, the round's sums are not used (`Diverged`). The replies that are left still
            # say who else diverged, so they are read to the end, without updates.
            if has_diverged:
                counted = []
            # The server's own half (split learning) is one state for the whole unit, not one for each payload. A method adds up
            # what the updates say of it, so it rides on the unit's first update and on no other.
            server = reply.server.unpack() if reply.server is not None else {}
            # By payload, as a sum is over clients of one payload. Sorted, as floating-point sums depend on their order.
            for key in sorted({int(work.payload_of[i]) for i in counted}):
                members = [i for i in counted if work.payload_of[i] == key]
                ids = tuple(client_ids[members].tolist())
                group, total_weight = work.groups[key], float(weights[members].sum())
                if key in reply.partial_sums or server:
                    packed = reply.partial_sums.get(key)
                    total = self._at_full_size(packed.unpack(), work, key, total_weight, trained) if packed else {}
                    yield Update(total, 1.0, ids, server, group, tuple(ranks[members].tolist()), total_weight)
                    server = {}
                for i, client_id in zip(members, ids, strict=True):
                    if client_id in reply.each:
                        weight = float(weights[i])
                        upload = self._at_full_size(reply.each[client_id].unpack(), work, key, 1.0, trained)
                        yield Update(upload, weight, (client_id,), {}, group, (int(ranks[i]),), weight)
            if reply.private:  # a worker with access to the store has written them there itself
                self.checkpoint.store.write(slot_of(work.round_idx, reply.index), reply.private)
            reply.let_go()
            replies.append(reply)
        if has_diverged:
            raise Diverged

    def _at_full_size(
        self, upload: Tensors, work: Work, key: int, total_weight: float, trained: dict[int, np.ndarray]
    ) -> Tensors:
        """An upload (or a sum of them) of clients with a smaller workload, at full depth and rank.

        ``total_weight``: the p_k that it has been multiplied by already. ``trained``: see `round.ranks.trained_rows`.
        """
        source = work.source[key]
        if work.workloads[key].depth != work.workloads[source].depth:
            upload = self.method.grown(upload, work.payloads[key])
        if source not in trained:
            return upload
        sent, rows = work.payloads[source].tensors, trained[source]
        return filled(upload, sent, total_weight=total_weight, trained=rows, axes=self.method.axes)

    # -- small things -----------------------------------------------------------------------------------------------------
    def _private_states(self) -> Iterator[tuple[int, int, Any]]:
        return self.checkpoint.all_private(self.sizes)

    def _is_over(self, progress: Progress) -> bool:
        return self.spec.rounds.is_over(progress.next_round, progress.sim_seconds)

    def _num_rounds(self, progress: Progress) -> int:
        """How many rounds the run has: fewer than its settings say once its virtual time is over."""
        return progress.next_round if self._is_over(progress) else self.spec.rounds.num_rounds

    def _is_evaluated(self, round_idx: int, sim_seconds: float) -> bool:
        """``sim_seconds``: virtual time at the round's end. The last round is always evaluated."""
        num_rounds = round_idx + 1
        return num_rounds % self.spec.evaluation.every == 0 or self.spec.rounds.is_over(num_rounds, sim_seconds)

    def _evaluations(
        self, state: State, round_idx: int, sim_seconds: float
    ) -> tuple[PendingQuality | None, PendingPersonal | None]:
        """Begin the evaluations that are due after a round: of the global model, and of clients' own."""
        if not self._is_evaluated(round_idx, sim_seconds):
            return None, None
        models, personal = self.method.evaluated(state, self._private_states), None
        evaluation = self.evaluator.evaluate(models)
        if self.personal.is_due(is_last=self.spec.rounds.is_over(round_idx + 1, sim_seconds)):
            personal = self.personal.evaluate(state, models, self.checkpoint.busy_until, self._private_states())
        return evaluation, personal

    def _event(self, kind: str, progress: Progress, row: Event | None = None) -> Event:
        return {
            "kind": kind,
            "round": progress.next_round,
            "num_rounds": self._num_rounds(progress),
            "row": row or {},
            "baseline": self.pending.baseline,
            "sim_seconds": progress.sim_seconds,
            "execution": self.spec.execution.model_dump(),
            "totals": dict(progress.totals),
            "notes": self.checkpoint.notes if kind == "start" else [],
        }


def _count(progress: Progress, row: Event) -> None:
    """Count a finished round, and add what it spent to the run's totals."""
    progress.next_round = int(row["round"])  # an index, from 0, while rows number rounds from 1
    if row["num_ok"] or row["num_failed"]:
        progress.failed_rounds = 0 if row["num_ok"] else progress.failed_rounds + 1
    for name in TOTALS:
        progress.totals[name] = progress.totals.get(name, 0.0) + float(row[name])
