"""The round planner: who takes part in a round, with what work, at what cost, and how the round ends, before any training.

The answers follow from the spec, the method's state, the clock and the round's number alone, so a plan and a run get the same
ones. Nothing is drawn from a generator that lives on from round to round: every draw has an address (`fleetune.seeds`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fleetune.cost.estimate import Load
from fleetune.data.batches import draw_batches, draw_epochs, without
from fleetune.engine.round.fitting import BudgetFitting, Costs
from fleetune.engine.round.rules import LATE, OK, Opening, Outcome, close_round, open_round, sample_clients
from fleetune.engine.round.serving import NO_WORK, ServerCosts
from fleetune.engine.round.work import Work
from fleetune.engine.round.workload import Workload
from fleetune.methods.base import ClientInfo, Payload, State
from fleetune.models.adapters import rank_of
from fleetune.pricing.pricing import Pricing, batch_load
from fleetune.problem import Problem
from fleetune.seeds import seed_of


@dataclass(frozen=True)
class RoundPlan:
    """A round of n clients before its work: what each receives, what that costs, and whose update will count."""

    client_ids: np.ndarray
    """(n,) int: the clients that were sampled."""
    work: Work
    """What each of them is to do, and the payloads that the server sends."""
    costs: Costs
    """Columns (n,): what the whole turn costs each client, refused ones included; units as in the columns' names."""
    outcome: Outcome
    """How the turn of each client ends, and how long the round takes."""
    refused_by: np.ndarray
    """(n,) objects: the budget for which a client is refused, or None."""
    hints: np.ndarray
    """(n,) objects: what would fit the client, in words, or None."""
    start_seconds: float
    """Virtual time at which the round begins."""
    waited_seconds: float
    """Virtual seconds before the start during which nobody was available."""
    num_available: int
    """Clients that could have been sampled."""
    busy_seconds: np.ndarray
    """(n,) float: virtual seconds that each client is at work, to its turn's end or until it leaves; 0 if it never begins."""
    server: ServerCosts
    """What the server's own work before the round cost; the round begins after it."""
    waiting_seconds: np.ndarray
    """(n,) float: virtual seconds from the round's start to each client's turn; 0 unless clients work in turn."""

    @property
    def begins(self) -> np.ndarray:
        """True for clients whose turn begins, (n,) bool: they are not refused, and the round was not closed before."""
        return begins(self.outcome, self.waiting_seconds)


def begins(outcome: Outcome, waiting_seconds: np.ndarray) -> np.ndarray:
    """True for clients whose turn begins, (n,) bool. Where clients work in turn, none is called after the round's close."""
    return outcome.started & ((waiting_seconds == 0) | (waiting_seconds < outcome.sim_seconds))


Hints = Literal["all", "once_per_stage", "none"]


class RoundPlanner:
    """Plans the rounds of one problem, one after the other.

    ``hints``: when it finds out what would fit refused clients: in every round, in the first of each stage alone (the same fits
    the same devices in the others), or in none. Each way that is tried takes a trace of its own.
    """

    def __init__(self, problem: Problem, *, hints: Hints = "all"):
        self.problem, self.spec, self.method = problem, problem.spec, problem.method
        self.pricing = Pricing(problem)
        self.hints = hints
        self.sizes = np.diff(problem.partition.offsets)  # (num_clients,) int: n_k
        self._ahead: dict[int, list[np.ndarray]] = {}  # round -> its batches, if they have been drawn already

    def round(
        self,
        state: State,
        round_idx: int,
        provisioned: MutableMapping[int, str],
        busy_until: np.ndarray,
        *,
        sim_seconds: float,
        server: ServerCosts = NO_WORK,
    ) -> RoundPlan:
        """The round that starts from ``state``; the one before ended at virtual time ``sim_seconds``.

        ``server``: the costs of the server's own work after that, for which everybody waits.

        Two values live from round to round and are brought up to date in place: ``provisioned``, client id -> key of the
        weights that it was sent last, and ``busy_until``, (num_clients,) float, the virtual time at which each client's
        last turn ends. Both are written after the close is known, because a client that is refused, or whose turn would begin
        after the close, neither receives nor does anything.
        Where the server keeps what it was sent (`Traits.caches`), ``provisioned`` says of which examples instead.
        """
        fleet = self.problem.fleet
        ready_seconds = sim_seconds + server.seconds
        opening = self._opening(round_idx, busy_until, ready_seconds)
        drawn_from = self.method.drawn_from(state, round_idx)
        client_ids = self.clients(drawn_from, opening.available)
        fitting = BudgetFitting(
            self.method,
            self.spec.fleet.adapt,
            price=lambda work, ids: self._price(work, ids, provisioned),
            broken=lambda ids, costs: fleet.budgets.broken(fleet.device_index[ids], costs),
            hints=self.hints == "all" or (self.hints == "once_per_stage" and self._begins_stage(round_idx)),
        )
        fitted = fitting.fit(self._work(state, round_idx, drawn_from, client_ids), client_ids)
        work, costs = fitted.work, fitted.costs
        waiting = self._waiting(round_idx, client_ids, costs["sim_seconds"], fitted.refused_by)
        dropped, busy_seconds = self._departures(round_idx, client_ids, costs, opening.start_seconds, waiting)
        outcome = close_round(
            self.spec.rounds,
            sim_seconds=waiting + costs["sim_seconds"],
            refused_by=fitted.refused_by,
            dropped=dropped,
        )
        begun = begins(outcome, waiting)
        busy_seconds = np.where(begun | ~outcome.started, busy_seconds, 0.0)
        for i in np.flatnonzero(begun).tolist():
            provision = work.payloads[work.payload_of[i]].provision
            if provision is not None:
                provisioned[int(client_ids[i])] = provision.key
        if self.method.traits.caches:
            self.note_sent(work, client_ids, outcome, provisioned)
        # A round that does not wait for everybody ends while some are still at work; they are not sampled until they are done.
        busy_until[client_ids[begun]] = opening.start_seconds + (waiting + busy_seconds)[begun]
        return RoundPlan(
            client_ids=client_ids,
            work=work,
            costs=costs,
            outcome=outcome,
            refused_by=fitted.refused_by,
            hints=fitted.hints,
            start_seconds=opening.start_seconds,
            waited_seconds=opening.start_seconds - ready_seconds,
            num_available=len(opening.available),
            busy_seconds=busy_seconds,
            server=server,
            waiting_seconds=waiting,
        )

    def _opening(self, round_idx: int, busy_until: np.ndarray, sim_seconds: float) -> Opening:
        availability, eligible = self.problem.fleet.availability, self.problem.eligible
        return open_round(availability, eligible, busy_until, round_idx=round_idx, sim_seconds=sim_seconds)

    def clients(self, round_idx: int, available: np.ndarray) -> np.ndarray:
        """Ids of the sampled clients, ascending, out of those that are ``available``."""
        return sample_clients(
            available,
            self.spec.rounds.clients_per_round,
            run_seed=self.spec.seed,
            round_idx=round_idx,
        )

    def draw_ahead(self, round_idx: int, busy_until: np.ndarray, *, sim_seconds: float) -> None:
        """Draw the batches of the next round while workers are busy with this one.

        They depend on who is sampled, and so on the clock and on who is still at work. Both are settled once this round is
        planned; the state, which is still being worked out, has no say in them. If the server may work before that round, the
        clock is not settled, and nothing is drawn.
        """
        if not self.method.traits.serves and not self.spec.rounds.is_over(round_idx, sim_seconds):
            available = self._opening(round_idx, busy_until, sim_seconds).available
            self._ahead = {round_idx: self.batches(round_idx, self.clients(round_idx, available))}

    def _begins_stage(self, round_idx: int) -> bool:
        return round_idx == 0 or self.method.stage(round_idx) != self.method.stage(round_idx - 1)

    def batches(self, round_idx: int, client_ids: np.ndarray) -> list[np.ndarray]:
        """Each client's examples, (steps, batch) int, drawn at the address (seed, round, client).

        Rows of the tokenised dataset; a batch that is short of examples is filled up with -1.
        """
        local, part = self.spec.local, self.problem.partition
        if not self.method.traits.draws_batches:
            return [np.zeros((0, local.batch_size), np.int64)] * len(client_ids)
        out = []
        for c in client_ids.tolist():
            shard, seed = part.shard(c), seed_of(self.spec.seed, "batches", round_idx, c)
            if local.epochs is None:
                out.append(draw_batches(shard, num_steps=local.steps, batch_size=local.batch_size, seed=seed))
            else:
                out.append(draw_epochs(shard, local.passes(len(shard)), batch_size=local.batch_size, seed=seed))
        return out

    def load(self, work: Work, client_ids: np.ndarray) -> Load:
        """Steps and lengths of the clients' batches, as the cost model takes them."""
        return batch_load(self.problem.inputs.train, work.rows)

    def new_load(self, work: Work, client_ids: np.ndarray, sent: Mapping[int, str]) -> Load:
        """The load of what clients have not sent before in the run (`Traits.caches`); ``sent``: as ``provisioned`` of `round`."""
        new = [
            without(rows, self.problem.partition.shard(client)[self._sent_of(client, sent.get(client))])
            for client, rows in zip(client_ids.tolist(), work.rows, strict=True)
        ]
        return batch_load(self.problem.inputs.train, new)

    def _sent_of(self, client: int, key: str | None) -> np.ndarray:
        """True for the examples of a client's shard that the server has, (n_k,) bool. ``key``: a bit for each, in hexadecimal."""
        size = int(self.sizes[client])
        if key is None:
            return np.zeros(size, bool)
        return np.unpackbits(np.frombuffer(bytes.fromhex(key), np.uint8), count=size).astype(bool)

    def note_sent(
        self, work: Work, client_ids: np.ndarray, outcome: Outcome, provisioned: MutableMapping[int, str]
    ) -> None:
        """Note what the server keeps of a round from now on. Who has left in its midst may not have sent everything."""
        for i in np.flatnonzero((outcome.status == OK) | (outcome.status == LATE)).tolist():
            client = int(client_ids[i])
            has = self._sent_of(client, provisioned.get(client))
            has |= np.isin(self.problem.partition.shard(client), work.rows[i])
            provisioned[client] = np.packbits(has).tobytes().hex()

    def _work(self, state: State, round_idx: int, drawn_from: int, client_ids: np.ndarray) -> Work:
        """One payload per group of clients, each client's group, and its batches as they were drawn for a round."""
        rows = self._ahead.pop(drawn_from, None) or self.batches(drawn_from, client_ids)
        client_groups: list[Hashable] = [None] * len(client_ids)
        # Without groups nobody is asked: a plan of a million clients makes no million `ClientInfo`.
        if self.method.traits.groups:
            client_groups = self.method.groups(state, round_idx, [self.info(c) for c in client_ids.tolist()])
        groups = list(dict.fromkeys(client_groups)) or [None]  # in the order of their first client, and not of a hash
        payloads = [self.method.broadcast(state, round_idx, group) for group in groups]
        return Work(
            round_idx,
            groups=groups,
            payloads=payloads,
            workloads=[self._full_workload(payload) for payload in payloads],
            source=list(range(len(payloads))),
            payload_of=np.array([groups.index(group) for group in client_groups], np.int64),
            rows=rows,
            checkpointing=np.full(len(client_ids), self.spec.local.checkpointing),
        )

    def _full_workload(self, payload: Payload) -> Workload:
        """All of a payload's work, as the job asks for it."""
        depth = self.method.submodel(payload).num_layers
        rank = rank_of(self.method.client_adapter(payload), self.method.axes)
        return Workload(self.spec.local.batch_size, rank, depth, self.spec.local.checkpointing)

    def _price(self, work: Work, client_ids: np.ndarray, provisioned: Mapping[int, str]) -> Costs:
        """What the work costs these clients, and the memory that they have for it (``budget_bytes``)."""
        fleet = self.problem.fleet
        load = self.load(work, client_ids)
        caches = self.method.traits.caches
        costs = self.pricing.columns(
            work.round_idx,
            client_ids,
            work.payloads,
            work.payload_of,
            self.new_load(work, client_ids, provisioned) if caches else load,
            self._provision_bytes(work, client_ids, provisioned),
            checkpointing=work.checkpointing,
            server_load=load if caches else None,
        )
        # The limit that the job sets for the client, which may be less than its device has (`fleet.budgets`).
        costs["budget_bytes"] = fleet.budgets.memory_bytes[fleet.device_index[client_ids]]
        return costs

    def _provision_bytes(self, work: Work, client_ids: np.ndarray, provisioned: Mapping[int, str]) -> np.ndarray:
        """Bytes that each client must be sent beside the payload, because it lacks them, float (n,)."""
        out = np.zeros(len(client_ids))
        if all(payload.provision is None for payload in work.payloads):
            return out
        for i, client_id in enumerate(client_ids.tolist()):
            payload = work.payloads[work.payload_of[i]]
            out[i] = self.pricing.provision_bytes(payload, provisioned.get(client_id))
        return out

    def info(self, client_id: int) -> ClientInfo:
        """What the server knows of a client."""
        fleet = self.problem.fleet
        kind = fleet.device_index[client_id]
        budget = float(fleet.budgets.memory_bytes[kind])
        category = int(self._main_categories[client_id])
        return ClientInfo(client_id, fleet.devices[kind].name, budget, int(self.sizes[client_id]), category)

    @cached_property
    def _main_categories(self) -> np.ndarray:
        """The category that most examples of each client have, the first of equals, int (num_clients,)."""
        part, categories = self.problem.partition, self.problem.inputs.train.categories
        counts = np.zeros((part.num_clients, self.problem.inputs.train.num_categories), np.int64)
        np.add.at(counts, (np.repeat(np.arange(part.num_clients), self.sizes), categories[part.indices]), 1)
        return counts.argmax(axis=1)

    def _waiting(
        self, round_idx: int, client_ids: np.ndarray, turn_seconds: np.ndarray, refused_by: np.ndarray
    ) -> np.ndarray:
        """Virtual seconds, (n,) float, for which each client waits for its turn: those of the turns before it.

        Refused clients have none. Whoever leaves in the midst of its turn is waited for until the turn would have ended.
        """
        waiting = np.zeros(len(client_ids))
        if self.method.traits.in_turn:
            order = self.method.turns(client_ids, round_idx)
            lasts = np.where([budget is None for budget in refused_by], turn_seconds, 0.0)[order]
            waiting[order[1:]] = np.cumsum(lasts)[:-1]
        return waiting

    def _departures(
        self,
        round_idx: int,
        client_ids: np.ndarray,
        costs: dict[str, np.ndarray],
        start_seconds: float,
        waiting: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Who leaves before the end of its turn, (n,) bool, and the virtual seconds that each is at work, (n,) float.

        The round begins at ``start_seconds``, and each turn ``waiting (n,)`` later; who has left by then is not at work at all.
        A client leaves if its availability ends before its turn does, or by chance (``fleet.dropout``); the latter has computed
        everything and leaves before it sends.
        """
        fleet = self.problem.fleet
        stays = np.maximum(fleet.availability.until(start_seconds)[client_ids] - start_seconds - waiting, 0.0)
        leaves = fleet.dropped(self.spec.seed, round_idx, client_ids)
        turn = costs["sim_seconds"] - np.where(leaves, costs["uplink_seconds"], 0.0)
        return leaves | (stays < costs["sim_seconds"]), np.minimum(turn, stays)
