"""FedAvg with a learning rate of the server: a method from outside, as a user writes it.

Reddi et al. 2021, "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 1 with plain SGD as the server's optimizer:
x <- x + eta (sum_k p_k x_k - x). With eta = 1 it is FedAvg.
"""

from collections.abc import Iterable

import torch
from pydantic import Field

from fleetune.methods.base import Method, MethodConfig, State, Update


class ServerRateConfig(MethodConfig):
    server_rate: float = Field(1.0, gt=0.0, le=10.0)
    """eta, the part of the way to the clients' mean that the server goes."""


class ServerRate(Method):
    Config = ServerRateConfig
    source = "FedAvg with a learning rate of the server (Reddi et al. 2021, arXiv 2003.00295)"

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        mean = super().aggregate(state, updates, round_idx).tensors
        moved = {name: torch.lerp(x, mean[name], self.config.server_rate) for name, x in state.tensors.items()}
        return State(moved, state.values)
