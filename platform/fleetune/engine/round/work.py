"""What a round's clients are given, as columns: which payload, how much of the work, which examples."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np

from fleetune.engine.round.workload import Share
from fleetune.methods.base import Payload


@dataclass(frozen=True)
class Work:
    """Payloads of n clients: one for each group, and one for each smaller share of it that clients have adapted to."""

    round_idx: int
    groups: list[Hashable]
    """The method's group that each payload is for."""
    payloads: list[Payload]
    group_of: np.ndarray
    """Index of each client's payload, (n,)."""
    rows: list[np.ndarray]
    """Each client's examples, (steps, batch); empty where batches are not drawn."""
    shares: list[Share]
    """How much of the work a client of each payload does."""
    source: list[int]
    """Index of the payload that each payload is a smaller share of: its own, where it is whole."""
    checkpointing: np.ndarray
    """Who computes its blocks again instead of keeping their activations, bool (n,)."""

    def at(self, where: np.ndarray) -> Work:
        """The work of some clients, by index or mask."""
        index = np.arange(len(self.group_of))[where]
        return replace(
            self,
            group_of=self.group_of[index],
            rows=[self.rows[i] for i in index] if self.rows else [],
            checkpointing=self.checkpointing[index],
        )

    def of_clients(self, field: str) -> np.ndarray:
        """A field of every client's share, (n,): ``batch_size``, ``rank`` or ``depth``."""
        return np.array([getattr(share, field) for share in self.shares], np.int64)[self.group_of]
