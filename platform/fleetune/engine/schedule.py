"""What is known of a round before anything is computed: who takes part, what they are given, what it costs, how it ends.

Pure functions of the spec, the method's state and the round's number, so that a plan and a run get the same answers.
"""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass

import numpy as np

from fleetune.data.batches import draw_batches
from fleetune.engine.costs import Load, Pricing, batch_load
from fleetune.engine.problem import Problem
from fleetune.engine.rounds import Outcome, close_round, sample_clients
from fleetune.methods.base import ClientInfo, Method, Payload, State
from fleetune.seeds import seed_of


@dataclass(frozen=True)
class Work:
    """What the sampled clients are given: payloads by group, each client's group, and its batches."""

    round_idx: int
    groups: list[Hashable]
    payloads: list[Payload]
    group_of: np.ndarray
    """Index of each client's group, (n,)."""
    rows: list[np.ndarray]


@dataclass(frozen=True)
class Scheduled:
    """A round before its work: its clients (n,), what each is given, what it costs each, and who will count."""

    client_ids: np.ndarray
    work: Work
    costs: dict[str, np.ndarray]
    outcome: Outcome


class Schedule:
    """Answers for every round of one problem."""

    def __init__(self, problem: Problem):
        self.problem, self.spec, self.method = problem, problem.spec, problem.method
        self.pricing = Pricing(problem)
        self.sizes = np.diff(problem.partition.offsets)
        self._ahead: dict[int, list[np.ndarray]] = {}

    def round(self, state: State, round_idx: int, provisioned: MutableMapping[int, str]) -> Scheduled:
        """The round that starts from ``state``. ``provisioned``, what each client was sent along last, is brought up to date."""
        client_ids = self.clients(round_idx)
        work = self._work(state, round_idx, client_ids)
        provision = provision_bytes(work, client_ids, provisioned)
        load = self.load(work, client_ids)
        costs = self.pricing.columns(round_idx, client_ids, work.payloads, work.group_of, load, provision)
        return Scheduled(client_ids, work, costs, self._outcome(round_idx, client_ids, costs))

    def clients(self, round_idx: int) -> np.ndarray:
        """Who is sampled, in ascending order."""
        return sample_clients(
            self.problem.eligible,
            self.spec.rounds.clients_per_round,
            run_seed=self.spec.seed,
            round_idx=round_idx,
        )

    def draw_ahead(self, round_idx: int) -> None:
        """Draw the batches of a round to come, while hosts work: they depend on nothing that is still being worked out."""
        if round_idx < self.spec.rounds.num_rounds:
            self._ahead = {round_idx: self.batches(round_idx, self.clients(round_idx))}

    def batches(self, round_idx: int, client_ids: np.ndarray) -> list[np.ndarray]:
        """Each client's examples, (steps, batch), drawn at the address (seed, round, client)."""
        local, part = self.spec.local, self.problem.partition
        if not self.method.draws_batches:
            return [np.zeros((0, local.batch_size), np.int64)] * len(client_ids)
        return [
            draw_batches(
                part.shard(c),
                num_steps=local.num_steps(int(self.sizes[c])),
                batch_size=local.batch_size,
                seed=seed_of(self.spec.seed, "batches", round_idx, c),
            )
            for c in client_ids.tolist()
        ]

    def load(self, work: Work, client_ids: np.ndarray) -> Load:
        """Steps and lengths of the batches that everybody is given."""
        return batch_load(self.problem.inputs.train, work.rows)

    def _work(self, state: State, round_idx: int, client_ids: np.ndarray) -> Work:
        """One payload per group of clients, each client's group, and its batches."""
        rows = self._ahead.pop(round_idx, None) or self.batches(round_idx, client_ids)
        if type(self.method).group is Method.group:
            payloads = [self.method.broadcast(state, round_idx, None)]
            return Work(round_idx, [None], payloads, np.zeros(len(client_ids), np.int64), rows)
        mine = [self.method.group(self._info(client_id)) for client_id in client_ids.tolist()]
        groups = list(dict.fromkeys(mine))
        payloads = [self.method.broadcast(state, round_idx, group) for group in groups]
        return Work(round_idx, groups, payloads, np.array([groups.index(group) for group in mine]), rows)

    def _info(self, client_id: int) -> ClientInfo:
        device = self.problem.fleet.profile(client_id)
        return ClientInfo(client_id, device.name, device.budget_bytes, int(self.sizes[client_id]))

    def _outcome(self, round_idx: int, client_ids: np.ndarray, costs: dict[str, np.ndarray]) -> Outcome:
        return close_round(
            self.spec.rounds,
            sim_seconds=costs["sim_seconds"],
            over_budget=costs["over_budget"],
            dropped=self.problem.fleet.dropped(self.spec.seed, round_idx, client_ids),
        )


def provision_bytes(work: Work, client_ids: np.ndarray, provisioned: MutableMapping[int, str]) -> np.ndarray:
    """Bytes of weights that clients must be sent along, because they see them for the first time."""
    out = np.zeros(len(client_ids))
    if all(payload.provision is None for payload in work.payloads):
        return out
    for i, client_id in enumerate(client_ids.tolist()):
        provision = work.payloads[work.group_of[i]].provision
        if provision is not None and provisioned.get(client_id) != provision.key:
            out[i] = provision.num_bytes
            provisioned[client_id] = provision.key
    return out
