"""SplitFrozen: the client's half is frozen; clients only run it forward, and the server alone learns.

Ma et al. 2025, "SplitFrozen: Split Learning with Device-side Model Frozen for Fine-Tuning LLM on Heterogeneous
Resource-Constrained Devices", arXiv 2503.18986.

        client k    S_k = blocks [0, c) of its batch, without adapters; S_k and the labels go up, nothing comes down
        server      Phi <- a step on the batch of all clients together

So an activation never changes. With ``cache_activations`` it goes up when its example is first met, and stays with the server.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import model_validator

from fleetune.methods.base import GlobalModel, Payload, PrivateStates, State
from fleetune.methods.split import SplitConfig, SplitMethod
from fleetune.methods.split_round import Path
from fleetune.methods.traits import Traits
from fleetune.tensors import Tensors
from fleetune.training.plan import LocalPlan, none


class SplitFrozenConfig(SplitConfig):
    """Settings of SplitFrozen."""

    name: Literal["split-frozen"] = "split-frozen"
    cache_activations: bool = False
    """The server keeps what it was sent of an example, so that a client runs and sends each of its examples once in a run."""

    @model_validator(mode="after")
    def _nothing_comes_down(self) -> SplitFrozenConfig:
        if self.head == "client":
            raise ValueError(
                "head: client sends hidden states down to compute the loss, but nothing comes down to a frozen client; set "
                "head: server, or use split-lora"
            )
        return self

    @property
    def traits(self) -> Traits:
        """Clients compute no gradients, and have no adapter that could have a smaller rank."""
        return replace(super().traits, backward=False, ranked=False, caches=self.cache_activations)


class SplitFrozen(SplitMethod):
    """Server state: the adapters of its own blocks."""

    Config = SplitFrozenConfig
    source: ClassVar[str] = "clients run a frozen half forward, the server learns (Ma et al. 2025, arXiv 2503.18986)"

    def start(self) -> State:
        """Adapters of the server's blocks alone."""
        return State({name: t for name, t in super().start().tensors.items() if not self.on_client(name)})

    def common_model(self, state: State, private: PrivateStates) -> GlobalModel:
        """The server's adapters, and for the client's blocks adapters that add nothing: B = 0."""
        model = super().common_model(state, private)
        frozen = {name: t for name, t in self.context.fresh_adapter().items() if self.on_client(name)}
        return replace(model, adapter={**frozen, **model.adapter})

    def paths(self, examples: np.ndarray) -> list[Path]:
        """The server alone learns."""
        return [Path(examples, learns="server")]

    def local_plan(self, payload: Payload) -> LocalPlan:
        """The client trains nothing, and sends nothing at the end."""
        return replace(super().local_plan(payload), trainable=none, uploads=none)

    def client_adapter(self, payload: Payload) -> Tensors:
        """None."""
        return {}
