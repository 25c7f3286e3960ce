"""SplitFed: clients of a cut model work side by side, and their halves are averaged in each round.

Thapa et al. 2022, "SplitFed: When Federated Learning Meets Split Learning", arXiv 2004.12088 (AAAI 2022).

        v1      Phi_k <- a step from client k alone, in its copy;      each round  Phi = sum_k p_k Phi_k
        v2      Phi   <- a step after each client's mini-batch, in an order that is drawn for the round
        both    each round  Theta = sum_k p_k Theta_k
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fleetune.methods.split import Serving, SplitConfig, SplitMethod, drawn_order
from fleetune.training.plan import ClientTask


class SFLConfig(SplitConfig):
    """Settings of SplitFed."""

    name: Literal["sfl"] = "sfl"
    version: Literal["v1", "v2"] = "v1"
    """v1: the server has a copy of its half for each client, and averages them. v2: it has one, which serves clients in turn."""

    @property
    def serving(self) -> Serving:
        """In copies, or in turn."""
        return "per_client" if self.version == "v1" else "in_turn"


class SFL(SplitMethod):
    """The family's form without a batch of all clients."""

    Config = SFLConfig
    source: ClassVar[str] = (
        "cut the model; a copy of the server's half per client, or one in turn (Thapa et al. 2022, arXiv 2004.12088)"
    )

    def serving_order(self, tasks: Sequence[ClientTask]) -> list[int]:
        """An order that is drawn for the round."""
        return drawn_order(self.context.seed, tasks[0].address[1], [task.client_id for task in tasks])
