"""What part of a round's work a client does: all of it, or less of one thing, so that it keeps to its budgets.

``fleet.adapt`` names the thing. A client whose budget is broken goes down the ladder of smaller shares until one fits:

* batch: half the examples of every step, and half again. The steps stay as many, and the client's weight stays n_k.
* checkpointing: blocks keep only their input and are computed again. The result is the same, so only the costs change.
* capacity: a submodel of half the blocks, and half again, as the method makes it (`Method.shrunk`).
* rank: the first half of every adapter's rank rows, and half again (see `engine.round.ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetune.engine.round.ranks import cut
from fleetune.fleet.fleet import BATCH, CAPACITY, CHECKPOINTING, RANK
from fleetune.methods.base import Method, Payload

FIELDS = {BATCH: "batch_size", CAPACITY: "depth", RANK: "rank"}


@dataclass(frozen=True)
class Share:
    """How much of the work a client does."""

    batch_size: int
    rank: int
    depth: int
    """Blocks of its submodel."""
    checkpointing: bool

    def ladder(self, kind: str) -> Iterator[Share]:
        """Ever smaller shares of one kind."""
        if kind == CHECKPOINTING:
            if not self.checkpointing:
                yield replace(self, checkpointing=True)
            return
        field = FIELDS[kind]
        size = getattr(self, field)
        while size > 1:
            size //= 2
            yield replace(self, **{field: size})

    def told(self, whole: Share) -> str:
        """In which respect it is less than the whole, in words."""
        parts = {
            "batch_size": f"batch size {self.batch_size}",
            "checkpointing": "checkpointing",
            "depth": f"a submodel of {self.depth} block{'s' * (self.depth > 1)}",
            "rank": f"rank {self.rank}",
        }
        return " with ".join(text for field, text in parts.items() if getattr(self, field) != getattr(whole, field))


def shrunk_payload(method: Method, payload: Payload, share: Share, whole: Share) -> Payload:
    """What a client with this share is sent instead."""
    if share.depth != whole.depth:
        payload = method.shrunk(payload, share.depth)
    if share.rank != whole.rank:
        payload = replace(payload, tensors=cut(payload.tensors, share.rank))
    return payload


def shrunk_rows(rows: Sequence[np.ndarray], share: Share) -> list[np.ndarray]:
    """Each client's examples (steps, batch): the first of every step, as many as the share has."""
    return [r[:, : share.batch_size] for r in rows]
