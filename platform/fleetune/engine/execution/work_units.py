"""Units of work as values: the clients that one call to a worker carries out, as columns, and the worker's reply.

The make-up of cohorts (which train stacked) and units (which travel together) follows from the spec and the round alone, never
from how many workers there are; each unit's updates are summed in its own order, and the units in theirs. So the result is the
same bits on one worker or many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from fleetune.engine.checkpoint.client_store import MAX_UNITS, ClientStore
from fleetune.engine.round.ranks import cut
from fleetune.tensors import Packed, Tensors
from fleetune.training.plan import ClientTask

# There are at most MAX_UNITS calls per round, so that a round of 10,000 clients costs no more calls than one of a thousand;
# fewer where clients do not train, because a call costs as much as a hundred of them (benchmarks/engine.py: 2.4 ms) and there
# is little to balance.
CLIENTS_PER_UNIT_WITHOUT_STEPS = 256
MIN_UNITS_WITHOUT_STEPS, MAX_UNITS_WITHOUT_STEPS = 2, 8


@dataclass(frozen=True)
class Cohort:
    """Clients [start, stop) of a unit, which share a payload and train stacked."""

    start: int
    stop: int
    payload: int
    batch_size: int
    """Examples of each step of its clients."""


@dataclass(frozen=True)
class WorkUnit:
    """Columns over the clients of a unit."""

    index: int
    round_idx: int
    stage: int
    run_seed: int
    client_ids: np.ndarray
    weights: np.ndarray
    learning_rate: float
    rows: np.ndarray
    """Examples of all steps of all clients, (sum of steps, largest batch); smaller batches are filled up with -1."""
    row_offsets: np.ndarray
    cohorts: tuple[Cohort, ...]
    ranks: np.ndarray
    """Of the adapters that they train."""
    store: ClientStore
    slots: Mapping[int, int] = field(default_factory=dict)
    """Where what each of them kept lies in the store."""
    private: Mapping[int, Packed] = field(default_factory=dict)
    """What they kept, for a worker that has no access to the store."""

    def with_private(self) -> WorkUnit:
        """The unit with what its clients kept."""
        return replace(self, private=dict(self.store.read(self.slots))) if self.slots else self

    def before(self, cohort: Cohort) -> dict[int, Tensors]:
        """What the cohort's clients kept last, of those that did."""
        ids = self.client_ids[cohort.start : cohort.stop].tolist()
        missing = {client: self.slots[client] for client in ids if client in self.slots and client not in self.private}
        found = {client: self.private[client] for client in ids if client in self.private}
        found.update(self.store.read(missing))
        return {client: packed.unpack() for client, packed in found.items()}

    def tasks(self, cohort: Cohort, before: Mapping[int, Tensors] = MappingProxyType({})) -> list[ClientTask]:
        """The cohort's tasks; ``before``: what its clients kept, which they go on with at the rank that they train."""
        out = []
        for i in range(cohort.start, cohort.stop):
            client_id = int(self.client_ids[i])
            private = before.get(client_id)
            out.append(
                ClientTask(
                    client_id=client_id,
                    weight=float(self.weights[i]),
                    rows=self.rows[self.row_offsets[i] : self.row_offsets[i + 1], : cohort.batch_size],
                    learning_rate=self.learning_rate,
                    address=(self.run_seed, self.round_idx),
                    private=None if private is None else cut(private, int(self.ranks[i])),
                )
            )
        return out


@dataclass
class WorkUnitReply:
    """Columns over the clients of a unit, and their tensors: a partial sum per payload, or each by itself."""

    index: int
    client_ids: np.ndarray
    losses: np.ndarray
    num_tokens: np.ndarray
    upload_bytes: np.ndarray
    cut_bytes: np.ndarray
    wall_seconds: np.ndarray
    keeps: np.ndarray
    """Whether the client keeps something of its own."""
    diverged: np.ndarray
    """Whether its loss or its tensors are not finite; the sums are of no use where such a client has a weight."""
    partial_sums: dict[int, Packed] = field(default_factory=dict)
    each: dict[int, Packed] = field(default_factory=dict)
    server: Packed | None = None
    private: dict[int, Packed] = field(default_factory=dict)
    """What the clients keep, from a worker that has no access to the store; others have written it there."""
    has_store: bool = True

    def let_go(self) -> None:
        """Drop the tensors that were used. The columns are copied, because they lie in the buffer that came with them."""
        self.partial_sums, self.server, self.each, self.private = {}, None, {}, {}
        for name in (
            "client_ids",
            "losses",
            "num_tokens",
            "upload_bytes",
            "cut_bytes",
            "wall_seconds",
            "keeps",
            "diverged",
        ):
            setattr(self, name, getattr(self, name).copy())


def make_work_units(
    *,
    round_idx: int,
    stage: int,
    run_seed: int,
    client_ids: np.ndarray,
    weights: np.ndarray,
    payloads: np.ndarray,
    rows: Sequence[np.ndarray],
    learning_rate: float,
    cohort_size: int,
    coupled: bool,
    ranks: np.ndarray,
    store: ClientStore,
    slots: Mapping[int, int],
) -> list[WorkUnit]:
    """Cohorts of at most ``cohort_size`` clients of one payload (all of them, if coupled), dealt to a bounded number of units.

    Clients with equally many steps stand together, the longest first; so do the units, and a late worker has little left to do.
    """
    if not len(client_ids):
        return []
    steps = np.array([len(r) for r in rows])
    order = np.lexsort((client_ids, -steps, payloads))
    cohorts: list[np.ndarray] = []
    for key in np.unique(payloads):
        members = order[payloads[order] == key]
        size = len(members) if coupled else cohort_size
        num_cohorts = -(-len(members) // size)
        cohorts += np.array_split(members, num_cohorts)
    cohorts.sort(key=lambda members: (-int(steps[members].sum()), int(client_ids[members[0]])))
    units = []
    num_units = min(MAX_UNITS if steps.any() else _units_without_steps(len(client_ids)), len(cohorts))
    for index, part in enumerate(np.array_split(np.arange(len(cohorts)), num_units)):
        members = np.concatenate([cohorts[c] for c in part])
        stops = np.cumsum([len(cohorts[c]) for c in part])
        spans = tuple(
            Cohort(int(stop - len(cohorts[c])), int(stop), int(payloads[cohorts[c][0]]), rows[cohorts[c][0]].shape[1])
            for c, stop in zip(part, stops, strict=True)
        )
        ids = client_ids[members]
        mine = [rows[i] for i in members]
        units.append(
            WorkUnit(
                index=index,
                round_idx=round_idx,
                stage=stage,
                run_seed=run_seed,
                client_ids=ids,
                weights=weights[members],
                learning_rate=learning_rate,
                rows=_as_one(mine),
                row_offsets=np.concatenate([[0], np.cumsum(steps[members])]),
                cohorts=spans,
                ranks=ranks[members],
                store=store,
                slots={client: slots[client] for client in ids.tolist() if client in slots},
            )
        )
    return units


def _units_without_steps(num_clients: int) -> int:
    wanted = -(-num_clients // CLIENTS_PER_UNIT_WITHOUT_STEPS)
    return min(max(wanted, MIN_UNITS_WITHOUT_STEPS), MAX_UNITS_WITHOUT_STEPS)


def _as_one(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The steps of all clients below each other, as wide as the largest batch."""
    width = max(r.shape[1] for r in rows)
    if all(r.shape[1] == width for r in rows):
        return np.concatenate(rows)
    return np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1])), constant_values=-1) for r in rows])
