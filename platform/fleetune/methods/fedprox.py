"""FedProx on LoRA adapters: clients are held near the global adapter.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127. The local loss gains
mu / 2 * ||theta - theta_global||^2 over the trained tensors (their Eq. 2); the rest is FedAvg, and mu = 0 is FedAvg.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fleetune.methods.base import Method, MethodConfig, Payload
from fleetune.tensors import Tensors
from fleetune.training.plan import LocalPlan


class FedProxConfig(MethodConfig):
    """Settings of FedProx."""

    name: Literal["fedprox"] = "fedprox"
    mu: float = Field(0.01, ge=0, le=1e6)
    """Weight of the proximal term."""


class FedProx(Method):
    """FedAvg with a proximal term in the local loss."""

    Config = FedProxConfig
    source: ClassVar[str] = "FedAvg with a proximal term (Li et al. 2020, arXiv 1812.06127)"

    def local_plan(self, payload: Payload) -> LocalPlan:
        """All of the adapter is trained, with the proximal term if mu > 0."""
        plan = super().local_plan(payload)
        return replace(plan, penalty=self._proximal) if self.config.mu else plan

    def _proximal(self, params: Tensors, start: Tensors) -> Tensor:
        """The term mu / 2 * ||theta_k - theta||^2 of each client, (K,). Both arguments: {name: (K, …)}."""
        moved = _flat(params) - _flat({name: start[name] for name in params})
        return self.config.mu / 2 * moved.square().sum(1)


def _flat(tensors: Tensors) -> Tensor:
    """All tensors side by side: (K, …) each -> (K, P), with P parameters per client."""
    return torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1)
