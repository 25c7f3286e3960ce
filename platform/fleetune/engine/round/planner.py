"""What is known of a round before anything is computed: who takes part, what they are given, what it costs, how it ends.

Pure functions of the spec, the method's state and the round's number, so that a plan and a run get the same answers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass

import numpy as np

from fleetune.cost.estimate import Load
from fleetune.data.batches import draw_batches, draw_epochs
from fleetune.engine.round.fitting import BudgetFitting, Costs
from fleetune.engine.round.rules import Opening, Outcome, close_round, open_round, sample_clients
from fleetune.engine.round.work import Work
from fleetune.engine.round.workload import Workload
from fleetune.methods.base import ClientInfo, Method, Payload, State
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
    """(n,) float: virtual seconds that each client is at work, to the end of its turn or until it leaves."""


class RoundPlanner:
    """Answers for every round of one problem."""

    def __init__(self, problem: Problem):
        self.problem, self.spec, self.method = problem, problem.spec, problem.method
        self.pricing = Pricing(problem)
        self.sizes = np.diff(problem.partition.offsets)
        self._ahead: dict[int, list[np.ndarray]] = {}

    def round(
        self,
        state: State,
        round_idx: int,
        provisioned: MutableMapping[int, str],
        busy_until: np.ndarray,
        *,
        sim_seconds: float,
    ) -> RoundPlan:
        """The round that starts from ``state``, the one before having ended at virtual time ``sim_seconds``.

        ``provisioned``, what each client was sent along last, and ``busy_until (num_clients,)``, the virtual time at which
        the last turn of each ends, are brought up to date.
        """
        fleet = self.problem.fleet
        opening = self._opening(round_idx, busy_until, sim_seconds)
        client_ids = self.clients(round_idx, opening.available)
        fitting = BudgetFitting(
            self.method,
            self.spec.fleet.adapt,
            price=lambda work, ids: self._price(work, ids, provisioned),
            broken=lambda ids, costs: fleet.budgets.broken(fleet.device_index[ids], costs),
            hints=self.tells_what_fits(round_idx),
        )
        fitted = fitting.fit(self._work(state, round_idx, client_ids), client_ids)
        work, costs = fitted.work, fitted.costs
        dropped, busy_seconds = self._departures(round_idx, client_ids, costs, opening.start_seconds)
        outcome = close_round(
            self.spec.rounds,
            sim_seconds=costs["sim_seconds"],
            refused_by=fitted.refused_by,
            dropped=dropped,
        )
        for i in np.flatnonzero(outcome.started).tolist():
            provision = work.payloads[work.payload_of[i]].provision
            if provision is not None:
                provisioned[int(client_ids[i])] = provision.key
        # Where a round does not wait for everybody, some are still at work when the next one begins.
        busy_until[client_ids[outcome.started]] = opening.start_seconds + busy_seconds[outcome.started]
        return RoundPlan(
            client_ids=client_ids,
            work=work,
            costs=costs,
            outcome=outcome,
            refused_by=fitted.refused_by,
            hints=fitted.hints,
            start_seconds=opening.start_seconds,
            waited_seconds=opening.start_seconds - sim_seconds,
            num_available=len(opening.available),
            busy_seconds=busy_seconds,
        )

    def _opening(self, round_idx: int, busy_until: np.ndarray, sim_seconds: float) -> Opening:
        availability, eligible = self.problem.fleet.availability, self.problem.eligible
        return open_round(availability, eligible, busy_until, round_idx=round_idx, sim_seconds=sim_seconds)

    def clients(self, round_idx: int, available: np.ndarray) -> np.ndarray:
        """Who is sampled of those that are there, in ascending order."""
        return sample_clients(
            available,
            self.spec.rounds.clients_per_round,
            run_seed=self.spec.seed,
            round_idx=round_idx,
        )

    def draw_ahead(self, round_idx: int, busy_until: np.ndarray, *, sim_seconds: float) -> None:
        """Draw the batches of a round to come, while workers work: they depend on nothing that is still being worked out."""
        if round_idx < self.spec.rounds.num_rounds:
            available = self._opening(round_idx, busy_until, sim_seconds).available
            self._ahead = {round_idx: self.batches(round_idx, self.clients(round_idx, available))}

    def tells_what_fits(self, round_idx: int) -> bool:
        """Whether refused clients of this round are told what would fit."""
        return True

    def batches(self, round_idx: int, client_ids: np.ndarray) -> list[np.ndarray]:
        """Each client's examples, (steps, batch), drawn at the address (seed, round, client); short batches are filled up."""
        local, part = self.spec.local, self.problem.partition
        if not self.method.draws_batches:
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
        """Steps and lengths of the batches that everybody is given."""
        return batch_load(self.problem.inputs.train, work.rows)

    def _work(self, state: State, round_idx: int, client_ids: np.ndarray) -> Work:
        """One payload per group of clients, each client's group, and its batches."""
        rows = self._ahead.pop(round_idx, None) or self.batches(round_idx, client_ids)
        if type(self.method).group is Method.group:
            mine: list[Hashable] = [None] * len(client_ids)
            groups: list[Hashable] = [None]
        else:
            mine = [self.method.group(self._info(client_id)) for client_id in client_ids.tolist()]
            groups = list(dict.fromkeys(mine))
        payloads = [self.method.broadcast(state, round_idx, group) for group in groups]
        return Work(
            round_idx,
            groups=groups,
            payloads=payloads,
            workloads=[self._full_workload(payload) for payload in payloads],
            source=list(range(len(payloads))),
            payload_of=np.array([groups.index(group) for group in mine], np.int64),
            rows=rows,
            checkpointing=np.full(len(client_ids), self.spec.local.checkpointing),
        )

    def _full_workload(self, payload: Payload) -> Workload:
        """All of a payload's work, as the job asks for it."""
        depth = self.method.submodel(payload).num_layers
        return Workload(self.spec.local.batch_size, self.spec.model.lora.rank, depth, self.spec.local.checkpointing)

    def _price(self, work: Work, client_ids: np.ndarray, provisioned: Mapping[int, str]) -> Costs:
        """What the work costs these clients, beside what they have."""
        fleet = self.problem.fleet
        costs = self.pricing.columns(
            work.round_idx,
            client_ids,
            work.payloads,
            work.payload_of,
            self.load(work, client_ids),
            provision_bytes(work, client_ids, provisioned),
            checkpointing=work.checkpointing,
        )
        costs["budget_bytes"] = fleet.budgets.memory_bytes[fleet.device_index[client_ids]]
        return costs

    def _info(self, client_id: int) -> ClientInfo:
        fleet = self.problem.fleet
        kind = fleet.device_index[client_id]
        budget = float(fleet.budgets.memory_bytes[kind])
        return ClientInfo(client_id, fleet.devices[kind].name, budget, int(self.sizes[client_id]))

    def _departures(
        self, round_idx: int, client_ids: np.ndarray, costs: dict[str, np.ndarray], start_seconds: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Who leaves before the end of its turn, bool (n,), and for how long everybody is at work, (n,)."""
        fleet = self.problem.fleet
        stays = fleet.availability.until(start_seconds)[client_ids] - start_seconds
        leaves = fleet.dropped(self.spec.seed, round_idx, client_ids)
        turn = costs["sim_seconds"] - np.where(leaves, costs["uplink_seconds"], 0.0)
        return leaves | (stays < costs["sim_seconds"]), np.minimum(turn, stays)


def provision_bytes(work: Work, client_ids: np.ndarray, provisioned: Mapping[int, str]) -> np.ndarray:
    """Bytes of weights that clients must be sent along, because they see them for the first time."""
    out = np.zeros(len(client_ids))
    if all(payload.provision is None for payload in work.payloads):
        return out
    for i, client_id in enumerate(client_ids.tolist()):
        provision = work.payloads[work.payload_of[i]].provision
        if provision is not None and provisioned.get(client_id) != provision.key:
            out[i] = provision.num_bytes
    return out
