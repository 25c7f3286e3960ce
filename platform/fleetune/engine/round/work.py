"""The work that a round gives its clients, as columns: which payload, how large a workload, which examples."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np

from fleetune.engine.round.workload import Workload
from fleetune.methods.base import Payload


@dataclass(frozen=True)
class Work:
    """The work of n clients and the m payloads that they receive.

    Two kinds of columns stand side by side here. Those by payload have m entries: one for each of the method's groups, and
    after them one for each smaller workload that clients of a group have adapted to. Those by client have n entries, in the
    order of the round's client ids. `payload_of` leads from a client to its payload, `source` from a payload that was cut
    down to the full one.
    """

    round_idx: int
    """The round, from 0."""

    # By payload.
    groups: list[Hashable]
    """(m): the method's group that each payload is for. Several payloads of one group differ in their workload."""
    payloads: list[Payload]
    """(m): what the server sends."""
    workloads: list[Workload]
    """(m): how much of the work a client of each payload does."""
    source: list[int]
    """(m): index of the full payload that each payload was cut down from; its own index if it was not cut."""

    # By client.
    payload_of: np.ndarray
    """(n,) int: index of the payload that each client receives."""
    rows: list[np.ndarray]
    """(n), each (steps, batch) int: the examples of each client's steps, as rows of the tokenised dataset; short batches are
    filled up with -1. The list is empty if batches are not drawn, as in a plan of a large fleet."""
    checkpointing: np.ndarray
    """(n,) bool: True if the client computes its blocks again instead of keeping their activations. By client and not by
    payload, as it changes costs alone: clients with and without it train on in one cohort."""

    def at(self, clients: np.ndarray) -> Work:
        """The work of some clients, by index or by mask (n,). The payloads stay as they are, so `payload_of` needs no mending."""
        index = np.arange(len(self.payload_of))[clients]
        return replace(
            self,
            payload_of=self.payload_of[index],
            rows=[self.rows[i] for i in index] if self.rows else [],
            checkpointing=self.checkpointing[index],
        )

    def full_ranks(self) -> np.ndarray:
        """The rank of every client's adapter before it was cut to the client's budget, int (n,)."""
        return np.array([self.workloads[source].rank for source in self.source], np.int64)[self.payload_of]

    def of_clients(self, field: str) -> np.ndarray:
        """A field of every client's workload, (n,) int: ``batch_size``, ``rank`` or ``depth``."""
        return np.array([getattr(workload, field) for workload in self.workloads], np.int64)[self.payload_of]
