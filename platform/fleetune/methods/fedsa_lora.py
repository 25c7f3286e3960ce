"""FedSA-LoRA: A is shared, B stays at home.

Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv 2410.01463 (ICLR 2025).

Every client trains both factors, uploads only A_k, and resumes with the averaged A = sum_k p_k A_k and its own B_k.
A client that has not taken part yet starts from B = 0; one that is not sampled keeps its B. There is no global B: what we
evaluate and ship takes the mean of the B_k so far, weighted by examples. The paper evaluates each client's own model, A with
B_k, on the client's own examples: so does ``evaluation.personal``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from fleetune.methods.base import (
    ClientInfo,
    GlobalModel,
    Method,
    MethodConfig,
    Payload,
    PrivateStates,
    State,
    is_lora_a,
    is_lora_b,
    zero_b,
)
from fleetune.methods.traits import Traits
from fleetune.tensors import Tensors, select, weighted_sum
from fleetune.training.plan import LocalPlan


class FedSALoRAConfig(MethodConfig):
    """FedSA-LoRA has no setting of its own."""

    name: Literal["fedsa-lora"] = "fedsa-lora"

    @property
    def traits(self) -> Traits:
        """Every client keeps its B."""
        return Traits(private=True)


class FedSALoRA(Method):
    """Server state: A alone. Private state: each client's B."""

    Config = FedSALoRAConfig
    source: ClassVar[str] = "share A, keep B on the client (Guo et al. 2025, arXiv 2410.01463)"

    def start(self) -> State:
        """A of the fresh adapter."""
        return State(select(self.context.fresh_adapter(), is_lora_a))

    def local_plan(self, payload: Payload) -> LocalPlan:
        """Train both factors, send A, keep B."""
        return replace(super().local_plan(payload), uploads=is_lora_a, keeps=is_lora_b)

    def client_adapter(self, payload: Payload) -> Tensors:
        """The shared A and B = 0; a client's own B is laid over it."""
        return {**payload.tensors, **zero_b(payload.tensors, self.context.sites)}

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """The shared A with the mean B of the clients that took part."""
        stored = list(private())
        total = sum(n for _, n, _ in stored)
        mean_b = weighted_sum((n / total, b) for _, n, b in stored) if stored else {}
        adapter = {**zero_b(state.tensors, self.context.sites), **state.tensors, **mean_b}
        return GlobalModel(self.context.whole_model, adapter)

    def personal(
        self, state: State, client: ClientInfo, private: Tensors, models: Mapping[str, GlobalModel]
    ) -> GlobalModel:
        """The shared A with the client's own B; B = 0 where its turns have all come to nothing."""
        adapter = {**zero_b(state.tensors, self.context.sites), **state.tensors, **private}
        return GlobalModel(self.context.whole_model, adapter)
