"""Scopes for the cost tracer: running code notes on which side it works and for which part of the memory it makes tensors.

Without a trace these are assignments to a variable that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

CLIENT, SERVER = "client", "server"
ADAPTERS, GRADIENTS, OPTIMIZER = "adapters", "gradients", "optimizer"
SIMULATION = "simulation"
"""Tensors and work of the simulation alone, which trains many clients at once; no device is charged for them."""


class _Marks:
    side: str = CLIENT
    part: str | None = None
    block: int | None = None
    """The block that runs, or ran last: the ``id`` of its module."""


current = _Marks()
"""The scope of the running code; a tracer reads it at every operator."""


@contextmanager
def on_server() -> Iterator[None]:
    """Work inside counts as the server's, although it runs in the same process as the client's (split learning)."""
    before, current.side = current.side, SERVER
    try:
        yield
    finally:
        current.side = before


@contextmanager
def on_client() -> Iterator[None]:
    """Work inside counts as the client's again, in the midst of the server's: a head that the client holds."""
    before, current.side = current.side, CLIENT
    try:
        yield
    finally:
        current.side = before


@contextmanager
def part(name: str) -> Iterator[None]:
    """Tensors made inside count for this part of the memory. Inside `SIMULATION` neither tensors nor work count for a device."""
    before, current.part = current.part, name
    try:
        yield
    finally:
        current.part = before
