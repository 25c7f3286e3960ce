"""DoFIT: every domain averages its own clients' adapters, and the domains share what matters to all of them.

Xu et al. 2024, "DoFIT: Domain-aware Federated Instruction Tuning with Alleviated Catastrophic Forgetting", NeurIPS 2024.
The equations are those of the authors' code, as the paper gives them in words.

Within domain j, over its clients of the round:           G_j = sum_k p_k theta_k / sum_k p_k
Tensors that matter:  the k of largest ||.||_F^2 in G_j;  shared: those that are among them in every domain
For each shared tensor, with m = mean_j G_j:              G_j <- G_j + sc |G_j - m| / ||G_j - m||_F     (DoFIT)
                                                          G_j <- m                                      (DoFIT-base)

Each domain goes on from its own G_j. A client belongs to the domain of the category that most of its examples have. The authors
sample clients of every domain in every round; here a domain may be without any, and is then left out of that round's step.
Where a domain agrees with the mean the formula is 0 / 0, which the code gives as NaN; here the tensor stays as it is. One domain
is FedAvg.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from fleetune.errors import UserError
from fleetune.methods.base import (
    ClientInfo,
    GlobalModel,
    Method,
    MethodConfig,
    Payload,
    PrivateStates,
    State,
    Update,
)
from fleetune.methods.traits import Traits
from fleetune.tensors import Tensors, add_weighted, weighted_sum

SAME = 1e-5
"""Domains that differ by less than this part of a tensor's norm agree on it: the step would blow up rounding errors."""


class DoFITConfig(MethodConfig):
    """Settings of DoFIT."""

    name: Literal["dofit"] = "dofit"
    domains: int | None = Field(None, ge=1, le=1000)
    """Domains M; categories are dealt to them in turn. Default: one for each category. The paper pairs two datasets."""
    top_k: int = Field(15, ge=0, le=1_000_000)
    """Tensors of largest norm in each domain that may be shared; 0 shares nothing. The paper takes 15 of the 64 it trains."""
    step: float = Field(1.0, ge=0, le=1e6)
    """Length sc of the step from a domain's tensor, in the norm of the whole tensor."""
    exchange: Literal["perturb", "mean"] = "perturb"
    """What becomes of a shared tensor: a step away from the domains' mean (DoFIT), or that mean (DoFIT-base)."""

    @property
    def traits(self) -> Traits:
        """The clients of a domain form a group."""
        return Traits(groups=True)

    def check_job(self, job: Any) -> None:
        """Every domain needs a client."""
        if self.domains is not None and self.domains > job.fleet.num_clients:
            raise UserError(
                f"exceeds the fleet of {job.fleet.num_clients} clients: a domain would have none",
                field="method.domains",
                value=self.domains,
                hint="lower it, or raise fleet.num_clients",
            )


class DoFIT(Method):
    """Server state: one adapter for each domain, ``domain.<j>.layers…``."""

    Config = DoFITConfig
    source: ClassVar[str] = "an adapter per domain, and a step between domains (Xu et al. 2024, NeurIPS 2024)"

    @property
    def num_domains(self) -> int:
        """M."""
        return self.config.domains or self.context.num_categories

    def check(self) -> None:
        """Every domain needs a category."""
        if self.num_domains > self.context.num_categories:
            raise UserError(
                f"exceeds the {self.context.num_categories} categories of the training examples: a domain would be empty",
                field="method.domains",
                value=self.num_domains,
                hint="lower it, or name a column with more categories (data.partition.key)",
            )

    # -- server ---------------------------------------------------------------------------------------------------------
    def start(self) -> State:
        """All domains start from one fresh adapter."""
        fresh = self.context.fresh_adapter()
        return State({f"domain.{j}.{name}": t.clone() for j in range(self.num_domains) for name, t in fresh.items()})

    def group(self, client: ClientInfo) -> Hashable:
        """The client's domain."""
        return client.category % self.num_domains

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The domain's adapter."""
        return Payload(_of_domain(state, group or 0))

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """Average within the domains that took part, then the step between them; the others stay as they are."""
        totals: dict[int, Tensors] = {}
        weights: dict[int, float] = {}
        for update in updates:
            domain = int(update.group)  # type: ignore[call-overload]
            add_weighted(totals.setdefault(domain, {}), update.tensors, update.weight)
            weights[domain] = weights.get(domain, 0.0) + update.total_weight
        averages = [
            {name: tensor / weights[j] if len(weights) > 1 else tensor for name, tensor in totals[j].items()}
            for j in sorted(totals)
        ]
        exchanged = exchange(averages, top_k=self.config.top_k, step=self.config.step, rule=self.config.exchange)
        changed = {
            f"domain.{j}.{name}": tensor
            for j, domain in zip(sorted(totals), exchanged, strict=True)
            for name, tensor in domain.items()
        }
        return State({**state.tensors, **changed})

    def evaluated(self, state: State, private: PrivateStates) -> Mapping[str, GlobalModel]:
        """Every domain's model; the run's quality is their mean."""
        whole = self.context.whole_model
        return {f"domain_{j}": GlobalModel(whole, _of_domain(state, j)) for j in range(self.num_domains)}

    def personal(
        self, state: State, client: ClientInfo, private: Tensors, models: Mapping[str, GlobalModel]
    ) -> GlobalModel:
        """That of the client's domain."""
        return models[f"domain_{self.group(client)}"]

    def deployed(self, state: State, private: PrivateStates) -> GlobalModel:
        """The mean of the domains' adapters, as one adapter is shipped."""
        domains = [_of_domain(state, j) for j in range(self.num_domains)]
        return GlobalModel(self.context.whole_model, weighted_sum((1.0 / len(domains), one) for one in domains))


def exchange(domains: list[Tensors], *, top_k: int, step: float, rule: str) -> list[Tensors]:
    """The step between domains (DoFIT, main_sft.py): each domain's adapter, its shared tensors replaced.

    ``step``: sc. ``rule``: ``perturb`` or ``mean``, as in `DoFITConfig.exchange`. The domains given are not changed.
    """
    if len(domains) < 2:
        return domains
    largest = [sorted(domain, key=lambda name: -float(domain[name].norm() ** 2))[:top_k] for domain in domains]
    shared = set(largest[0]).intersection(*largest[1:])
    out = [dict(domain) for domain in domains]
    for name in shared:
        mean = torch.stack([domain[name] for domain in domains]).mean(dim=0)  # m
        for domain, new in zip(domains, out, strict=True):
            distance = (domain[name] - mean).abs()
            length = float(distance.norm())
            if rule == "mean":
                new[name] = mean.clone()
            elif length > SAME * float(domain[name].norm()):
                new[name] = domain[name] + distance * (step / length)
    return out


def _of_domain(state: State, domain: int) -> Tensors:
    """A domain's adapter."""
    prefix = f"domain.{domain}."
    return {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
