"""How much of a round's work a client does: all of it, or less of one thing, so that it keeps to its budgets.

``fleet.adapt`` names the thing. A client that would break a budget goes down the ladder of smaller workloads until one fits:

* batch: half the examples of every step, and half again. The steps stay as many, and the client's weight stays n_k.
* checkpointing: blocks keep only their input and are computed again. The result is the same, so only the costs change.
* capacity: a submodel of half the blocks, and half again, as the method makes it (`Method.shrunk`).
* rank: the first half of every adapter's rank rows, and half again (see `engine.round.ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetune.fleet.fleet import BATCH, CAPACITY, CHECKPOINTING, RANK
from fleetune.methods.base import Method, Payload

FIELDS = {BATCH: "batch_size", CAPACITY: "depth", RANK: "rank"}


@dataclass(frozen=True)
class Workload:
    """How much of a round's work a client does."""

    batch_size: int
    """Examples in each step."""
    rank: int
    """LoRA rank of the adapter that it trains."""
    depth: int
    """Blocks of its submodel."""
    checkpointing: bool
    """True if its blocks keep only their input and are computed again in the backward pass."""

    def ladder(self, kind: str) -> Iterator[Workload]:
        """Ever smaller workloads of one kind, which is a value of ``fleet.adapt``; none if it is as small as it gets."""
        if kind == CHECKPOINTING:
            if not self.checkpointing:
                yield replace(self, checkpointing=True)
            return
        field = FIELDS[kind]
        size = getattr(self, field)
        while size > 1:
            size //= 2
            yield replace(self, **{field: size})

    def reduction(self, full: Workload) -> str:
        """How it differs from the full workload, in words for people: "rank 2", "batch size 1 with checkpointing"."""
        parts = {
            "batch_size": f"batch size {self.batch_size}",
            "checkpointing": "checkpointing",
            "depth": f"a submodel of {self.depth} block{'s' * (self.depth > 1)}",
            "rank": f"rank {self.rank}",
        }
        return " with ".join(text for field, text in parts.items() if getattr(self, field) != getattr(full, field))


def shrunk_payload(method: Method, payload: Payload, workload: Workload, full: Workload) -> Payload:
    """The payload for clients of a smaller workload, made from the one for the full workload."""
    if workload.depth != full.depth:
        payload = method.shrunk(payload, workload.depth)
    if workload.rank != full.rank:
        payload = method.narrowed(payload, workload.rank)
    return payload


def shrunk_rows(rows: Sequence[np.ndarray], workload: Workload) -> list[np.ndarray]:
    """Each client's examples, (steps, batch) ints: of every step the first ones, as many as the workload's batch size."""
    return [batches[:, : workload.batch_size] for batches in rows]
