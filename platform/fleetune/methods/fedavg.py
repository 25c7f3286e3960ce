"""FedAvg on LoRA adapters, and FedIT: one rule, two published protocols.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629.
Zhang et al. 2024, "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644.

Clients train A and B and upload both; the server averages each factor by itself, A = sum_k p_k A_k, B = sum_k p_k B_k
with p_k = n_k / sum n over the clients that count. The mean of products is not the product of means; that gap is what
exact-aggregation methods remove. Both names run this rule; their job files hold the two protocols.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fleetune.methods.base import Method, MethodConfig


class FedAvgConfig(MethodConfig):
    """FedAvg of the adapters has no setting of its own."""

    name: Literal["fedavg"] = "fedavg"


class FedAvg(Method):
    """The base rule as it is."""

    Config = FedAvgConfig
    source: ClassVar[str] = "average A and B over clients by their examples (McMahan et al. 2017, arXiv 1602.05629)"


class FedITConfig(MethodConfig):
    """FedIT has no setting of its own."""

    name: Literal["fedit"] = "fedit"


class FedIT(Method):
    """The base rule under the name of its instruction-tuning protocol."""

    Config = FedITConfig
    source = "FedAvg of LoRA for instruction tuning (Zhang et al. 2024, arXiv 2305.05644)"
