"""A round's clients and its close, on the virtual clock: pure functions of seed, round and costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fleetune.fleet.availability import Availability
from fleetune.fleet.budgets import MEMORY
from fleetune.seeds import rng
from fleetune.spec.run_config import RoundsConfig

OK, OOM, REFUSED, DROPPED, LATE, FAILED = "ok", "oom", "refused", "dropped", "late", "failed"


def sample_clients(eligible: np.ndarray, num_clients: int, *, run_seed: int, round_idx: int) -> np.ndarray:
    """Clients of one round, without replacement, in ascending order; the same for (seed, round) whenever it is asked.

    All of them, where fewer than ``num_clients`` can be asked.
    """
    size = min(num_clients, len(eligible))
    chosen = rng(run_seed, "sampling", round_idx).choice(len(eligible), size=size, replace=False)
    return np.sort(eligible[chosen])


@dataclass(frozen=True)
class Opening:
    """How a round begins: when, and with whom to choose from."""

    available: np.ndarray
    """Clients that can be sampled, ascending."""
    start_seconds: float
    """Virtual time at which it begins: at once, or when the first of them came."""


def open_round(
    availability: Availability, eligible: np.ndarray, busy_until: np.ndarray, *, round_idx: int, sim_seconds: float
) -> Opening:
    """Who can be sampled at this virtual time: those that are there and are not at work for a round that closed without them.

    ``busy_until``: the virtual time at which each client's last turn ends, (num_clients,). Where nobody can be sampled, the
    server waits for the first to come or to be done. Nobody ever comes, or comes by waiting (``bernoulli``): the round is
    empty.
    """
    start: float | None = sim_seconds
    while start is not None:
        there = availability.at(round_idx, start)[eligible]
        available = eligible[there & (busy_until[eligible] <= start)]
        if len(available):
            return Opening(available, start)
        start = _next_change(availability, eligible[~there], busy_until[eligible[there]], start)
    return Opening(np.zeros(0, eligible.dtype), sim_seconds)


def _next_change(availability: Availability, away: np.ndarray, busy_until: np.ndarray, seconds: float) -> float | None:
    """The next virtual time at which one of the clients that are away comes, or one of those that are there is done."""
    comes = availability.next_change(seconds, away) if len(away) else None
    known = [*([] if comes is None else [comes]), *([float(busy_until.min())] if len(busy_until) else [])]
    return min(known, default=None)


@dataclass(frozen=True)
class Outcome:
    """How a round ends: each client's status (n,) and the virtual seconds until the close."""

    status: np.ndarray
    sim_seconds: float

    @property
    def started(self) -> np.ndarray:
        """Who was not refused, bool (n,)."""
        return (self.status != OOM) & (self.status != REFUSED)

    def count(self, status: str) -> int:
        """Clients with this status."""
        return int((self.status == status).sum())


def close_round(
    rules: RoundsConfig, *, sim_seconds: np.ndarray, refused_by: np.ndarray, dropped: np.ndarray
) -> Outcome:
    """Who counts: refused clients never start, dropped ones leave, and of the others those that are back in time.

    ``refused_by`` names the budget that a client would break, or None, objects (n,): memory makes it ``oom``.
    Ties at the k-th place go to the smaller client id, because clients are in ascending order and the sort is stable.
    """
    status = np.full(len(sim_seconds), OK, dtype=object)
    status[dropped] = DROPPED
    refused = np.array([budget is not None for budget in refused_by], bool)
    status[refused] = np.where(refused_by[refused] == MEMORY, OOM, REFUSED)
    arriving = np.flatnonzero(status == OK)
    waiting = np.flatnonzero(~refused)
    if rules.close == "deadline" and rules.deadline_seconds is not None:
        status[arriving[sim_seconds[arriving] > rules.deadline_seconds]] = LATE
        longest = float(sim_seconds[waiting].max(initial=0.0))
        return Outcome(status, min(longest, rules.deadline_seconds))
    if rules.close == "first_k" and rules.first_k is not None and len(arriving) > rules.first_k:
        by_time = arriving[np.argsort(sim_seconds[arriving], kind="stable")]
        status[by_time[rules.first_k :]] = LATE
        return Outcome(status, float(sim_seconds[by_time[rules.first_k - 1]]))
    return Outcome(status, float(sim_seconds[waiting].max(initial=0.0)))
