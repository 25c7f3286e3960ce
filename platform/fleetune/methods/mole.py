"""MoLE in a federation: adapters that exist already stay frozen, and a gate at every matrix weighs whole adapters.

Wu, Huang and Wei 2024, "Mixture of LoRA Experts", ICLR 2024, arXiv 2404.13628, sections 3.2 and 3.3.

        E_n(x) = s_n B_n A_n x                                             output of adapter n of N at one matrix
        G = softmax(<e, norm(E_1(x) … E_N(x))> / tau),  e (N, N out)       (norm over the joined outputs, without weights)
        y = W x + sum_n G_n E_n(x)
        loss = loss of the tokens + alpha L,  L = -sum_n log q_n           (q_n: mean of G_n over all matrices)

e and tau are trained. The paper joins the outputs of a whole sequence, so that its gate has a size for each length; here every
token has a gate of its own, with e shared by all tokens, which is causal. tau = exp(log_tau) stays positive.

The federated form is a reconstruction: FedAvg of the gates. The authors' repository holds no code.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from fleetune.methods.base import State
from fleetune.methods.gates import GateConfig, Gates
from fleetune.training.gates import balanced
from fleetune.training.plan import Loss


class MoLEConfig(GateConfig):
    """Settings of MoLE."""

    name: Literal["mole"] = "mole"
    balance: float = Field(0.01, ge=0, le=1e6)
    """alpha, the weight of the balance loss, which is N log N if all adapters are used equally and more otherwise. The paper's
    value is not known. Training losses on record include it; 0: none."""


class MoLE(Gates):
    """Server state: ``<site>.mole_gate`` (N, N, out) and ``<site>.mole_log_tau`` (1,) of every adapted matrix."""

    Config = MoLEConfig
    config: MoLEConfig
    source: ClassVar[str] = "gates that mix whole adapters (Wu et al. 2024, arXiv 2404.13628)"

    def start(self) -> State:
        """e = 0 and tau = 1: the mean of all adapters."""
        count, tensors = self.num_adapters, {}
        for site, (_, num_out) in self.context.sites.items():
            tensors[f"{site}.mole_gate"] = torch.zeros(count, count, num_out)
            tensors[f"{site}.mole_log_tau"] = torch.zeros(1)
        return State(tensors)

    def loss(self) -> Loss | None:
        """With the balance of the gates."""
        return balanced(self.config.balance) if self.config.balance else None
