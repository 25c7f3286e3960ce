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
    """Ids of ``num_clients`` clients out of ``eligible``, without replacement and ascending; of all if there are fewer.

    The draw has the address (seed, round), so it is the same however often and whenever it is repeated.
    """
    size = min(num_clients, len(eligible))
    chosen = rng(run_seed, "sampling", round_idx).choice(len(eligible), size=size, replace=False)
    return np.sort(eligible[chosen])


@dataclass(frozen=True)
class Opening:
    """How a round begins: when, and with whom to choose from."""

    available: np.ndarray
    """Ids of the clients that can be sampled, ascending."""
    start_seconds: float
    """Virtual time at which it begins: at once, or when the first of them came."""


def open_round(
    availability: Availability, eligible: np.ndarray, busy_until: np.ndarray, *, round_idx: int, sim_seconds: float
) -> Opening:
    """The clients that can be sampled: those that are available and not at work for a round that closed without them.

    ``eligible``: ids (m,), ascending. ``busy_until``: (num_clients,) float, the virtual time at which each client's last turn
    ends. If nobody can be sampled at ``sim_seconds``, the server waits for the first client to come or to be done. The round is
    empty if nobody will ever come, or if waiting helps nobody (``bernoulli``: who is there goes by the round, not by the time).
    """
    start: float | None = sim_seconds
    while start is not None:
        there = availability.at(round_idx, start)[eligible]
        available = eligible[there & (busy_until[eligible] <= start)]
        if len(available):
            return Opening(available, start)
        # Who comes may still be at work, and who is done may have left, so the question is asked again at each change. That ends:
        # each change lies after the one before, and once all turns are over the first client that comes can be sampled.
        start = _next_change(availability, eligible[~there], busy_until[eligible[there]], start)
    return Opening(np.zeros(0, eligible.dtype), sim_seconds)


def _next_change(availability: Availability, away: np.ndarray, busy_until: np.ndarray, seconds: float) -> float | None:
    """The next virtual time at which a client that is ``away`` (ids) comes, or one that is there and busy is done."""
    comes = availability.next_change(seconds, away) if len(away) else None
    times = [*([] if comes is None else [comes]), *([float(busy_until.min())] if len(busy_until) else [])]
    return min(times, default=None)


@dataclass(frozen=True)
class Outcome:
    """How a round ends."""

    status: np.ndarray
    """(n,) objects: ``ok``, ``oom``, ``refused``, ``dropped``, ``late``, and after the work also ``failed``."""
    sim_seconds: float
    """Virtual seconds from the round's begin to its close."""

    @property
    def started(self) -> np.ndarray:
        """True for clients that were not refused, (n,) bool."""
        return (self.status != OOM) & (self.status != REFUSED)

    def count(self, status: str) -> int:
        """Clients with this status."""
        return int((self.status == status).sum())


def close_round(
    rules: RoundsConfig, *, sim_seconds: np.ndarray, refused_by: np.ndarray, dropped: np.ndarray
) -> Outcome:
    """The statuses and the close by the job's rule: refused clients never start, dropped ones leave, others may be late.

    All (n,), clients ascending: ``sim_seconds`` of each full turn; ``refused_by``, objects: the budget that the client would
    break, or None (memory makes it ``oom``); ``dropped``, bool. Without a rule the server waits for all that started, dropped
    ones too: it learns of their leaving only when they do not come. Ties at the k-th place go to the smaller client id, because
    clients are in ascending order and the sort is stable.
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
