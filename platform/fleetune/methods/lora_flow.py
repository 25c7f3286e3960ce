"""LoRA-Flow in a federation: adapters that exist already stay frozen, and a gate in every block weighs them token by token.

Wang et al. 2024, "LoRA-Flow: Dynamic LoRA Fusion for Large Language Models in Generative Tasks", ACL 2024, arXiv 2402.11455.

        w = softmax(W h) + b,   W (N, hidden), b (N,)         h: the residual stream of the token as it enters the block
        y = W_0 x + sum_n w_n s_n B_n A_n x                   at every adapted matrix of the block

The bias is outside the softmax, as in the authors' code, so that weights need not sum to 1. N (hidden + 1) numbers are trained in
each block: 262,208 of LLaMA2-7B for two adapters.

The federated form is a reconstruction: FedAvg of the gates.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from fleetune.errors import UserError
from fleetune.methods.base import GlobalModel, PrivateStates, State
from fleetune.methods.gates import GateConfig, Gates


class LoRAFlowConfig(GateConfig):
    """Settings of LoRA-Flow."""

    name: Literal["lora-flow"] = "lora-flow"
    bias: tuple[float, ...] = ()
    """b at the start, a number for each adapter in their order. Default: 0, which begins with the adapters' mean. The paper has
    (-0.5, 0.5) for a language and a task, which begins with the task's adapter alone."""
    temperature: float = Field(1.0, gt=0, le=1e6)
    """Divides W h where the model is evaluated, and in what is shipped. The paper takes 1.1 for Chinese and Russian maths, and 1
    while it trains, as all do here."""


class LoRAFlow(Gates):
    """Server state: ``layers.<n>.flow_weight`` (N, hidden) and ``flow_bias`` (N,) of every block."""

    Config = LoRAFlowConfig
    config: LoRAFlowConfig
    source: ClassVar[str] = "a gate per block that mixes adapters by token (Wang et al. 2024, arXiv 2402.11455)"

    def check(self) -> None:
        """There are two adapters at least, and as many biases as adapters."""
        super().check()
        bias = self.config.bias
        if bias and len(bias) != self.num_adapters:
            raise UserError(
                f"must hold a number for each of the {self.num_adapters} adapters",
                field="method.bias",
                value=list(bias),
                hint="leave it out to begin with the adapters' mean",
            )

    def start(self) -> State:
        """W = 0: weights 1 / N + b."""
        hidden, count, tensors = self.context.base.shape.hidden_size, self.num_adapters, {}
        bias = torch.tensor(self.config.bias or [0.0] * count)
        for block in range(self.context.num_layers):
            tensors[f"layers.{block}.flow_weight"] = torch.zeros(count, hidden)
            tensors[f"layers.{block}.flow_bias"] = bias.clone()
        return State(tensors)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """The mean of the clients' gates, at the temperature of evaluations."""
        model = super().evaluated(state, private)
        return GlobalModel(
            model.model,
            {n: t / self.config.temperature if n.endswith("flow_weight") else t for n, t in model.adapter.items()},
        )
