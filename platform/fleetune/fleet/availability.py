"""When clients are available: always, by a draw each round, by two states in virtual time, or from a trace file.

A client can be sampled while it is available. If it becomes unavailable before its turn is over it leaves the round
(``dropped``). Every kind is a function of seed, round and virtual time alone, so that a run that is resumed sees the
same clients. All results are arrays over the full fleet.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from fleetune.config import Config, Place
from fleetune.errors import UserError
from fleetune.fleet.availability_trace import AvailabilityTrace
from fleetune.seeds import rng


class AvailabilityConfig(Config):
    """Who can be sampled, and who goes away while at work."""

    kind: Literal["always", "bernoulli", "markov", "trace"] = "always"
    """always. bernoulli: a draw for each client and round. markov: on and off for exponential times, in virtual seconds.
    trace: the intervals of a file."""
    probability: float = Field(default=0.8, gt=0, le=1)
    """Chance that a client is available in a round (bernoulli)."""
    mean_on_seconds: float = Field(default=3600.0, ge=1, le=1e9)
    """Mean virtual time that a client stays available (markov)."""
    mean_off_seconds: float = Field(default=1800.0, ge=1, le=1e9)
    """Mean virtual time that it stays away (markov)."""
    path: Place | None = None
    """File of intervals (trace), .csv or .parquet: columns client_id or device, start_seconds, end_seconds in virtual time.
    A client without an interval is never available."""

    @model_validator(mode="after")
    def _a_trace_has_a_file(self) -> AvailabilityConfig:
        if (self.kind == "trace") != (self.path is not None):
            rule = "is needed for kind=trace" if self.path is None else f"goes with kind=trace, not {self.kind}"
            raise UserError(rule, field="fleet.availability.path", value=self.path, hint="see docs/guides/budgets.md")
        return self


class Availability(Protocol):
    """Answers for all registered clients."""

    def at(self, round_idx: int, seconds: float) -> np.ndarray:
        """True for each client that can be sampled for a round that begins at this virtual time, bool (num_clients,)."""
        ...

    def until(self, seconds: float) -> np.ndarray:
        """The virtual time in seconds until which each client that is available now stays so, (num_clients,)."""
        ...

    def next_change(self, seconds: float, client_ids: np.ndarray) -> float | None:
        """The virtual time at which the first of these clients becomes available; None: never. None of them is available now."""
        ...


class ByDraw:
    """Each round anew, each client with the same probability; whoever is there stays to the round's end."""

    def __init__(self, num_clients: int, *, run_seed: int, probability: float):
        self.num_clients, self.run_seed, self.probability = num_clients, run_seed, probability

    def at(self, round_idx: int, seconds: float) -> np.ndarray:
        """One draw per client at the round's address."""
        return rng(self.run_seed, "availability", round_idx).random(self.num_clients) < self.probability

    def until(self, seconds: float) -> np.ndarray:
        """Nobody goes away."""
        return np.full(self.num_clients, math.inf)

    def next_change(self, seconds: float, client_ids: np.ndarray) -> float | None:
        """Waiting changes nothing: the next draw is the next round's."""
        return None


class TwoStates:
    """A Markov chain in continuous time for each client: exponential times on and off, begun in equilibrium.

    A stay is the time between two changes. The k-th stay of all clients is drawn at the address (seed, "availability", k), so
    the state at any virtual time does not depend on which times were asked for before.
    """

    def __init__(self, num_clients: int, *, run_seed: int, mean_on_seconds: float, mean_off_seconds: float):
        self.num_clients, self.run_seed = num_clients, run_seed
        self.means = (mean_off_seconds, mean_on_seconds)
        fraction_on = mean_on_seconds / (mean_on_seconds + mean_off_seconds)
        self._starts_on = rng(run_seed, "availability-start").random(num_clients) < fraction_on
        self._begin()

    def at(self, round_idx: int, seconds: float) -> np.ndarray:
        """Who is on at this time."""
        return self._stay(seconds)[0]

    def until(self, seconds: float) -> np.ndarray:
        """The end of the stay of those that are on."""
        return self._stay(seconds)[1]

    def next_change(self, seconds: float, client_ids: np.ndarray) -> float | None:
        """The first end of a stay away."""
        return float(self._stay(seconds)[1][client_ids].min())

    def _begin(self) -> None:
        # _ends[i] (num_clients,) holds when stay number _first + i of each client ends. Stays that all clients are past are
        # dropped, so that a long run does not keep them all.
        self._first = 0
        self._ends = [np.zeros(self.num_clients) + self._duration(0)]

    def _is_on(self, stay: np.ndarray | int) -> np.ndarray:
        """True for each client that is on in its stay of this number, bool (num_clients,): stays alternate."""
        return (np.asarray(stay) % 2 == 0) == self._starts_on

    def _duration(self, stay: int) -> np.ndarray:
        """The length in seconds of each client's stay of this number, (num_clients,)."""
        draws = rng(self.run_seed, "availability", stay).standard_exponential(self.num_clients)
        return draws * np.where(self._is_on(stay), self.means[1], self.means[0])

    def _stay(self, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """(True for each client that is on at this time, the virtual time at which its stay ends), (num_clients,) each."""
        if self._first and (self._ends[0] > seconds).any():  # an earlier time than the last: from the beginning
            self._begin()
        while (self._ends[-1] <= seconds).any():
            self._ends.append(self._ends[-1] + self._duration(self._first + len(self._ends)))
        while len(self._ends) > 1 and (self._ends[0] <= seconds).all():
            del self._ends[0]
            self._first += 1
        ends = np.stack(self._ends)
        past = (ends <= seconds).sum(axis=0)  # (num_clients,): stays of _ends that each client is past
        return self._is_on(self._first + past), ends[past, np.arange(self.num_clients)]


class FromTrace:
    """The intervals of a file."""

    def __init__(self, num_clients: int, trace: AvailabilityTrace):
        self.num_clients, self.trace = num_clients, trace

    def at(self, round_idx: int, seconds: float) -> np.ndarray:
        """Who has an interval that holds this time: start <= t < end."""
        return self.until(seconds) > -math.inf

    def until(self, seconds: float) -> np.ndarray:
        """The end of that interval."""
        now = (self.trace.start_seconds <= seconds) & (seconds < self.trace.end_seconds)
        out = np.full(self.num_clients, -math.inf)
        out[self.trace.client_ids[now]] = self.trace.end_seconds[now]
        return out

    def next_change(self, seconds: float, client_ids: np.ndarray) -> float | None:
        """The first start that is still to come."""
        to_come = (self.trace.start_seconds > seconds) & np.isin(self.trace.client_ids, client_ids)
        return float(self.trace.start_seconds[to_come].min()) if to_come.any() else None


def build_availability(
    config: AvailabilityConfig, num_clients: int, *, run_seed: int, trace: AvailabilityTrace | None
) -> Availability:
    """The availability that the job file describes; ``trace`` holds the intervals of its file, by client."""
    if config.kind == "trace":
        assert trace is not None, "a trace is read with the other inputs"
        return FromTrace(num_clients, trace)
    if config.kind == "markov":
        return TwoStates(
            num_clients,
            run_seed=run_seed,
            mean_on_seconds=config.mean_on_seconds,
            mean_off_seconds=config.mean_off_seconds,
        )
    probability = config.probability if config.kind == "bernoulli" else 1.0
    return ByDraw(num_clients, run_seed=run_seed, probability=probability)
