"""Work units, the values that cross between coordinator and workers: the clients of one call, as columns, and the reply.

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
from fleetune.models.adapters import AXES, Axes, cut
from fleetune.tensors import Packed, Tensors
from fleetune.training.plan import ClientTask

# There are at most MAX_UNITS calls per round, so that a round of 10,000 clients costs no more calls than one of a thousand. If
# clients do not train there are fewer still: a call costs as much as a hundred such clients (benchmarks/engine.py: 2.4 ms), and
# there is little to balance.
CLIENTS_PER_UNIT_WITHOUT_STEPS = 256
MIN_UNITS_WITHOUT_STEPS, MAX_UNITS_WITHOUT_STEPS = 2, 8


@dataclass(frozen=True)
class Cohort:
    """Clients [start, stop) of a unit, which share a payload and train stacked."""

    start: int
    stop: int
    payload: int
    """Key of their payload among those of the round."""
    batch_size: int
    """Examples in each step of its clients."""


@dataclass(frozen=True)
class WorkUnit:
    """A unit of n clients: all that a worker needs to know of them, as columns, cohort after cohort."""

    index: int
    """Number of the unit among those of its round."""
    round_idx: int
    stage: int
    run_seed: int
    client_ids: np.ndarray
    """(n,) int."""
    weights: np.ndarray
    """(n,) float: p_k, each client's share in the round's average; 0 for one whose update comes too late."""
    learning_rate: float
    rows: np.ndarray
    """(sum of steps, largest batch) int: the examples of all steps of all clients, as rows of the tokenised dataset, client
    after client. Smaller batches are filled up with -1."""
    row_offsets: np.ndarray
    """(n + 1,) int: the steps of client i are ``rows[row_offsets[i] : row_offsets[i + 1]]``."""
    cohorts: tuple[Cohort, ...]
    """They follow each other without gaps and cover all n clients."""
    ranks: np.ndarray
    """(n,) int: the rank of the adapter that each client trains."""
    full_ranks: np.ndarray
    """(n,) int: the rank of that adapter before it was cut to the client's budget."""
    store: ClientStore
    slots: Mapping[int, int] = field(default_factory=dict)
    """Client id -> the slot of the store that holds its private tensors; only of clients that have some."""
    private: Mapping[int, Packed] = field(default_factory=dict)
    """Client id -> its private tensors, for a worker that has no access to the store."""

    def with_private(self) -> WorkUnit:
        """The unit together with its clients' private tensors."""
        return replace(self, private=dict(self.store.read(self.slots))) if self.slots else self

    def read_private(self, cohort: Cohort) -> dict[int, Tensors]:
        """Client id -> its private tensors at full rank, for those clients of the cohort that have some."""
        ids = self.client_ids[cohort.start : cohort.stop].tolist()
        packed = {client: self.private[client] for client in ids if client in self.private}
        # What did not travel with the unit is in the store; `with_private` sends all or nothing.
        in_store = {client: self.slots[client] for client in ids if client in self.slots and client not in packed}
        packed.update(self.store.read(in_store))
        return {client: row.unpack() for client, row in packed.items()}

    def tasks(
        self, cohort: Cohort, private_tensors: Mapping[int, Tensors] = MappingProxyType({}), axes: Axes = AXES
    ) -> list[ClientTask]:
        """The cohort's tasks. ``private_tensors``: as `read_private` returns them; each is cut to the rank its client trains."""
        tasks = []
        for i in range(cohort.start, cohort.stop):
            client_id = int(self.client_ids[i])
            private = private_tensors.get(client_id)
            tasks.append(
                ClientTask(
                    client_id=client_id,
                    weight=float(self.weights[i]),
                    rows=self.rows[self.row_offsets[i] : self.row_offsets[i + 1], : cohort.batch_size],
                    learning_rate=self.learning_rate,
                    address=(self.run_seed, self.round_idx),
                    private=None if private is None else cut(private, int(self.ranks[i]), axes),
                )
            )
        return tasks


@dataclass
class WorkUnitReply:
    """The answer to a unit of n clients: columns in the order of the unit, and tensors, summed or client by client.

    A method reads either ``partial_sums`` or ``each``: a sum is as large as one upload however many clients it holds.
    """

    index: int
    """Number of the unit among those of its round."""
    client_ids: np.ndarray
    """(n,) int, as in the unit."""
    losses: np.ndarray
    """(n,) float: mean training loss over the client's steps, in nats per token."""
    num_tokens: np.ndarray
    """(n,) int: tokens that the client trained on, in all steps."""
    upload_bytes: np.ndarray
    """(n,) int: size of the tensors that the client sends to the server, in bytes; 0 if it sends none."""
    cut_bytes: np.ndarray
    """(2, n) int: bytes that the client sent over the cut and received over it; 0 without split learning."""
    wall_seconds: np.ndarray
    """(n,) float: real seconds of the client's cohort, shared equally among its clients."""
    keeps: np.ndarray
    """(n,) bool: true if the client has new private tensors."""
    diverged: np.ndarray
    """(n,) bool: true if the client's loss or tensors are not finite. If such a client has a weight, the sums are useless."""
    partial_sums: dict[int, Packed] = field(default_factory=dict)
    """Payload -> the sum of weight times upload over its clients, for methods that need no more than that."""
    each: dict[int, Packed] = field(default_factory=dict)
    """Client id -> its upload without its weight, for the other methods; late clients' uploads stay behind."""
    server: Packed | None = None
    """State of the server that its own half trained meanwhile (split learning), summed over the cohorts."""
    private: dict[int, Packed] = field(default_factory=dict)
    """Client id -> its new private tensors, if the worker has no access to the store; else it has written them there."""
    has_store: bool = True
    """True if the worker has access to the run's store."""

    def let_go(self) -> None:
        """Drop the tensors, which have been used. The columns are copied, as they are views into the same buffer."""
        self.partial_sums, self.server, self.each, self.private = {}, None, {}, {}
        for name, column in list(vars(self).items()):
            if isinstance(column, np.ndarray):
                setattr(self, name, column.copy())


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
    full_ranks: np.ndarray,
    store: ClientStore,
    slots: Mapping[int, int],
) -> list[WorkUnit]:
    """Cohorts of at most ``cohort_size`` clients of one payload (all of them, if coupled), dealt to a bounded number of units.

    ``client_ids``, ``weights``, ``payloads`` (keys), ``ranks`` and ``full_ranks`` are (n,); ``rows`` holds (steps, batch) of each
    client. The units with the longest cohorts come first: whichever worker ends last then ends with a short one.
    """
    if not len(client_ids):
        return []
    steps = np.array([len(r) for r in rows])
    cohorts = _cohorts(client_ids, payloads, steps, size=None if coupled else cohort_size)
    # Neither number depends on the workers: units are summed one by one, so another division would give other bits.
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
        units.append(
            WorkUnit(
                index=index,
                round_idx=round_idx,
                stage=stage,
                run_seed=run_seed,
                client_ids=ids,
                weights=weights[members],
                learning_rate=learning_rate,
                rows=_as_one([rows[i] for i in members]),
                row_offsets=np.concatenate([[0], np.cumsum(steps[members])]),
                cohorts=spans,
                ranks=ranks[members],
                full_ranks=full_ranks[members],
                store=store,
                slots={client: slots[client] for client in ids.tolist() if client in slots},
            )
        )
    return units


def _cohorts(client_ids: np.ndarray, payloads: np.ndarray, steps: np.ndarray, *, size: int | None) -> list[np.ndarray]:
    """The clients of each cohort, as indices into the three columns, (n,) each; the cohorts with most steps come first.

    ``size``: clients of a cohort at most; None: all clients of a payload make one cohort.
    """
    # Clients with equally many steps stand together, because a cohort takes as long as its longest client. The id comes last, so
    # that the order in which clients were sampled decides nothing.
    order = np.lexsort((client_ids, -steps, payloads))
    cohorts: list[np.ndarray] = []
    for key in np.unique(payloads):
        members = order[payloads[order] == key]
        num_cohorts = -(-len(members) // (size or len(members)))
        # Sizes differ by one at most: of 9 clients in cohorts of 8, the ninth would else train alone, unstacked.
        cohorts += np.array_split(members, num_cohorts)
    cohorts.sort(key=lambda members: (-int(steps[members].sum()), int(client_ids[members[0]])))
    return cohorts


def _units_without_steps(num_clients: int) -> int:
    wanted = -(-num_clients // CLIENTS_PER_UNIT_WITHOUT_STEPS)
    return min(max(wanted, MIN_UNITS_WITHOUT_STEPS), MAX_UNITS_WITHOUT_STEPS)


def _as_one(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The (steps, batch) of all clients below each other, as wide as the largest batch; -1 fills up smaller ones."""
    width = max(r.shape[1] for r in rows)
    if all(r.shape[1] == width for r in rows):
        return np.concatenate(rows)
    return np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1])), constant_values=-1) for r in rows])
