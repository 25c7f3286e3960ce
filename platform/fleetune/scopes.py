"""What running code says of itself to whoever traces it: on which side it works, and what the tensors that it makes are for.

Outside a trace these are assignments to a variable that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

CLIENT, SERVER = "client", "server"
ADAPTERS, GRADIENTS, OPTIMIZER = "adapters", "gradients", "optimizer"
SIMULATION = "simulation"
"""What only the simulation holds and does, so that many clients' rows can be worked on at once; no device is charged for it."""


class _Marks:
    side: str = CLIENT
    part: str | None = None
    block: int | None = None
    """Which block runs, or ran last: the identity of its module."""


current = _Marks()
"""Where the running code is; a tracer reads it at every operator."""


@contextmanager
def on_server() -> Iterator[None]:
    """What runs inside is the server's work, although it is carried out where the client's is (split learning)."""
    before, current.side = current.side, SERVER
    try:
        yield
    finally:
        current.side = before


@contextmanager
def part(name: str) -> Iterator[None]:
    """Tensors that are made inside belong to this part of the memory; work inside `SIMULATION` is nobody's."""
    before, current.part = current.part, name
    try:
        yield
    finally:
        current.part = before
