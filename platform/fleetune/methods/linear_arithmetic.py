"""Linear arithmetic: the mean of adapters that exist is the adapter of a task that needs them all; nothing is trained.

Zhang et al. 2023, "Composing Parameter-Efficient Modules with Arithmetic Operations", NeurIPS 2023, arXiv 2306.14870; one of the
baselines of SmartFed (Wu et al. 2025, arXiv 2512.00902).

        on factors    A = sum_i w_i A_i,  B = sum_i w_i B_i                        (SmartFed, equation 3; rank max_i r_i)
                      dW = s B A = s sum_i sum_j w_i w_j B_i A_j: products of different adapters come in
        on product    A = [A_1; …; A_N],  B = [w_1 B_1 … w_N B_N]                  (rank sum_i r_i)
                      dW = s sum_i w_i B_i A_i, exactly

w_i = 1 / N unless they are given. Factors of smaller rank are filled up with zeros. Clients are sent the adapter once and compute
nothing, so every round is as the first; with ``tune`` it is the start of FedIT (`methods.fedavg`), and is trained.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fleetune.errors import UserError
from fleetune.methods.base import Payload, Provision, State, Update
from fleetune.methods.reuse import Reuse, ReuseConfig
from fleetune.methods.traits import Traits
from fleetune.models.adapters import rank_of
from fleetune.models.library import Skill
from fleetune.tensors import Tensors, add_weighted
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan, none
from fleetune.training.worker import Worker

Weight = Annotated[float, Field(ge=-1e3, le=1e3)]


class LinearArithmeticConfig(ReuseConfig):
    """Settings of linear arithmetic."""

    name: Literal["linear-arithmetic"] = "linear-arithmetic"
    weights: tuple[Weight, ...] = ()
    """Weight of each adapter, in the order of ``adapters``, those of a library's folder by name. Empty: 1 / N each."""
    on: Literal["factors", "product"] = "factors"
    """What is summed: A and B by themselves, as SmartFed's equation 3 has it, or the products B A, exactly and at the sum of the
    ranks."""
    tune: bool = False
    """Whether clients then train the composed adapter, as in FedIT; otherwise they do nothing."""

    @property
    def traits(self) -> Traits:
        """Without tuning nobody works on batches, and nothing changes."""
        return Traits() if self.tune else Traits(draws_batches=False, backward=False, ranked=False, steps=False)


class LinearArithmetic(Reuse):
    """Server state: the composed adapter."""

    Config = LinearArithmeticConfig
    config: LinearArithmeticConfig
    source: ClassVar[str] = "the weighted mean of adapters that exist (Zhang et al. 2023, arXiv 2306.14870)"

    def check(self) -> None:
        """There is a weight for each adapter."""
        given = len(self.config.weights)
        if given not in (0, len(self.skills)):
            raise UserError(
                f"has {given} weights for {len(self.skills)} adapters: {', '.join(skill.name for skill in self.skills)}",
                field="method.weights",
                value=list(self.config.weights),
                hint="give one weight for each, or none for the mean",
            )

    def start(self) -> State:
        """The composed adapter."""
        num = len(self.skills)
        weights = self.config.weights or (1 / num,) * num
        compose = factors_sum if self.config.on == "factors" else product_sum
        return State(compose(self.skills, weights, self.context.lora.scaling))

    def broadcast(self, state: State, round_idx: int, group: Hashable) -> Payload:
        """The adapter; without tuning it is sent once to each client, and not again."""
        if self.config.tune:
            return Payload(state.tensors)
        return Payload({}, held=state.tensors, provision=Provision("composed", lambda last: [state.tensors]))

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The mean of what clients trained; without tuning nothing changes."""
        return super().aggregate(state, updates, round_idx) if self.config.tune else state

    def columns(self, state: State) -> dict[str, float]:
        """Mean number of ranks that a matrix adds up for a token."""
        return {"activated_rank": mean_rank(state.tensors)}

    def local_plan(self, payload: Payload) -> LocalPlan:
        """Without tuning no tensor is trained, and none goes up."""
        return super().local_plan(payload) if self.config.tune else LocalPlan(self.context.whole_model, none, none)

    def client_adapter(self, payload: Payload) -> Tensors:
        """The composed adapter."""
        return payload.tensors if self.config.tune else payload.held

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """Nothing, without tuning: there is no loss to report."""
        if self.config.tune:
            return super().local_update(worker, payload, tasks)
        return CohortUpdate(upload=None, losses=np.zeros(len(tasks)), num_tokens=np.zeros(len(tasks), np.int64))


def factors_sum(skills: Sequence[Skill], weights: Sequence[float], scaling: float) -> Tensors:
    """A = sum_i w_i A_i (r, in) and B = sum_i w_i s_i / s B_i (out, r), r the largest rank at the matrix.

    ``scaling``: s, by which the network multiplies every product; s_i is the adapter's own.
    """
    total: Tensors = {}
    for skill, weight in zip(skills, weights, strict=True):
        add_weighted(total, padded(skill.pairs(scaling), skills), weight)
    return total


def product_sum(skills: Sequence[Skill], weights: Sequence[float], scaling: float) -> Tensors:
    """The pairs side by side, so that s B A = sum_i w_i s_i B_i A_i: A (sum r_i, in), B (out, sum r_i)."""
    parts = [skill.pairs(scaling) for skill in skills]
    return {
        name: torch.cat([part[name] for part in parts])
        if name.endswith(".lora_A")
        else torch.cat([weight * part[name] for part, weight in zip(parts, weights, strict=True)], dim=1)
        for name in parts[0]
    }


def padded(pairs: Tensors, skills: Sequence[Skill]) -> Tensors:
    """The pairs at the largest rank that any of the skills has at each matrix, filled up with zeros."""
    out: Tensors = {}
    for name, tensor in pairs.items():
        axis = 0 if name.endswith(".lora_A") else 1
        rank = max(skill.tensors[name].shape[axis] for skill in skills)
        size = list(tensor.shape)
        size[axis] = rank - size[axis]
        out[name] = torch.cat([tensor, tensor.new_zeros(size)], dim=axis) if size[axis] else tensor
    return out


def mean_rank(pairs: Tensors) -> float:
    """The mean rank of the adapted matrices."""
    ranks = [rank_of({name: tensor}) for name, tensor in pairs.items() if name.endswith(".lora_A")]
    return sum(ranks) / len(ranks)
