"""What methods share that hold a pool of adapters frozen and train a gate that mixes them (`models.pools`)."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from fleetune.methods.base import GlobalModel, Payload, PrivateStates, Provision, State
from fleetune.methods.reuse import Reuse, ReuseConfig
from fleetune.methods.traits import Traits
from fleetune.models.model import Model
from fleetune.models.pools import POOL, num_adapters
from fleetune.tensors import Tensors, select
from fleetune.training.gates import noting
from fleetune.training.plan import LocalPlan, Loss


class GateConfig(ReuseConfig):
    """Settings of every method that trains gates over a pool of adapters."""

    record_fusion: bool = False
    """Whether clients also send the mean of their gates, a few numbers for each matrix, for the figure of a run's fusion weights.
    Without it nothing but gates travels."""

    @property
    def traits(self) -> Traits:
        """Gates have no ranks that a client could leave out."""
        return Traits(ranked=False)


class Gates(Reuse):
    """Server state: the gates, and with ``record_fusion`` the mean gates of the last round, ``<site>.fusion``."""

    config: GateConfig

    @cached_property
    def pool(self) -> Tensors:
        """All adapters, each with its scale multiplied into B: ``pool.<n>.<site>.lora_A`` and ``.lora_B``."""
        return {f"{POOL}{n}.{name}": t for n, skill in enumerate(self.skills) for name, t in skill.pairs(1.0).items()}

    @property
    def ranks(self) -> dict[str, list[int]]:
        """{site: rank of each adapter there}, from the adapters that were read."""
        return {site: [len(skill.tensors[f"{site}.lora_A"]) for skill in self.skills] for site in self.context.sites}

    @property
    def num_adapters(self) -> int:
        """N."""
        return len(self.skills)

    # -- server ---------------------------------------------------------------------------------------------------------
    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The gates. A client fetches the pool once, when it takes part for the first time."""
        provision = Provision("pool", lambda last: [self.pool])
        return Payload(select(state.tensors, is_gate), held=self.held(state), provision=provision)

    def held(self, state: State) -> Tensors:
        """What clients hold: the pool."""
        return self.pool

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """The pool with the mean of the clients' gates."""
        model = Model(self.context.whole_model.submodel, self.held(state))
        return GlobalModel(model, select(state.tensors, is_gate))

    def activated(self, state: State) -> dict[str, int]:
        """{site: ranks that are computed for a token there}: all of the pool's."""
        return {site: sum(ranks) for site, ranks in self.ranks.items()}

    def columns(self, state: State) -> dict[str, float]:
        """Ranks that are computed for a token, on average over the adapted matrices."""
        counts = self.activated(state).values()
        return {"activated_rank": sum(counts) / len(counts)}

    def records(self, state: State) -> dict[str, Any]:
        """The adapters by name, their ranks in each matrix, the ranks computed there, and the mean gates if clients sent them."""
        fusion = {name.removesuffix(".fusion"): t.tolist() for name, t in state.tensors.items() if is_fusion(name)}
        kept = {"adapters": [skill.name for skill in self.skills], "ranks": self.ranks, "quotas": self.activated(state)}
        return {**kept, **({"fusion": fusion} if fusion else {})}

    # -- client ---------------------------------------------------------------------------------------------------------
    def client_adapter(self, payload: Payload) -> Tensors:
        """The gates that were sent, and a place for their means."""
        if not self.config.record_fusion:
            return payload.tensors
        return {**payload.tensors, **{f"{site}.fusion": torch.zeros(n) for site, n in self.num_gates(payload).items()}}

    def num_gates(self, payload: Payload) -> dict[str, int]:
        """{site: gates of a token there}, read from what the client holds: one for each adapter."""
        return dict.fromkeys(sites_of(payload.held), num_adapters(payload.held))

    def loss(self) -> Loss | None:
        """A client's loss; None: that of its tokens alone."""
        return None

    def local_plan(self, payload: Payload) -> LocalPlan:
        """Train and send the gates."""
        plan = replace(super().local_plan(payload), trainable=is_gate, loss=self.loss())
        if not self.config.record_fusion:
            return plan
        loss, after_backward = noting(plan.loss)
        return replace(plan, loss=loss, after_backward=after_backward)


def sites_of(held: Tensors) -> list[str]:
    """The sites at which the first adapter of a pool has a pair, and so every other."""
    first = f"{POOL}0."
    pairs = (name for name in held if name.startswith(first) and name.endswith(".lora_A"))
    return [name.removeprefix(first).removesuffix(".lora_A") for name in pairs]


def is_fusion(name: str) -> bool:
    """True for mean gates, which clients note and do not train."""
    return name.endswith(".fusion")


def is_gate(name: str) -> bool:
    """True for what is trained: neither mean gates nor importances."""
    return not name.endswith((".fusion", ".importance"))
