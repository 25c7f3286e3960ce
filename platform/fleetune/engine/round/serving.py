"""The server's own work before a round: carried out piece by piece, and priced on ``fleet.server``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fleetune.methods.base import Method, ServerWork, State
from fleetune.tensors import Tensors


@dataclass(frozen=True)
class ServerCosts:
    """What the server's own work before a round costs; 0 if there is none."""

    seconds: float = 0.0
    """Virtual seconds, for which the round's clients wait."""
    flops: float = 0.0

    def columns(self) -> dict[str, float]:
        """As columns of rounds.parquet."""
        return {"server_seconds": self.seconds, "server_flops": self.flops}


NO_WORK = ServerCosts()
CarryOut = Callable[[ServerWork], Tensors]
Price = Callable[[ServerWork], tuple[float, float]]


def serve(
    method: Method, state: State, round_idx: int, *, carry_out: CarryOut, price: Price
) -> tuple[State, ServerCosts]:
    """The state with which the round's clients begin, and what the server's own work until then costs.

    ``carry_out``: an executor's `serve`; in a plan, which works nothing out, it returns no tensors. ``price``: seconds and FLOPs
    (`Pricing.server_work`).
    """
    seconds = flops = 0.0
    while method.traits.serves and (work := method.server_work(state, round_idx)) is not None:
        if work.is_charged:
            more_seconds, more_flops = price(work)
            seconds, flops = seconds + more_seconds, flops + more_flops
        state = method.served(state, work, carry_out(work))
    return state, ServerCosts(seconds, flops)
