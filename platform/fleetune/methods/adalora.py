"""AdaLoRA: every adapter is a product of three factors, and a budget of ranks goes to the matrices where it matters most.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv 2303.10512.
The paper trains one model. The federated rule is a reconstruction, as no published one prunes anything.

        adapter       dW = s B diag(E) A,  E = 0 at the start, A and B small and random                      (equation 3)
        client's loss L + gamma · mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F                  (equation 4)
        importance    I = |w dL/dw|,  Ibar <- b1 Ibar + (1 - b1) I,  U <- b2 U + (1 - b2) |I - Ibar|         (equations 8 to 10)
        triplet i     S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)  with  s(w) = Ibar U                    (equations 7, 11)
        server        A, E, B and S averaged by examples; E_i <- 0 unless S_i is among the b(t) largest of all matrices  (5, 6)
        budget        b = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3                              (equation 12)

A triplet i of a matrix is E_i with row i of A and column i of B. The moving averages Ibar and U stay with their client; one score
a triplet goes up. t counts rounds: the end of a round is an allocation. For the first t_i rounds all triplets are kept, and over
the last t_f the set of those that are left is fixed. Before that a pruned E_i may grow again and be kept the next time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fleetune.errors import UserError
from fleetune.methods.base import Method, MethodConfig, Payload, State, Update
from fleetune.methods.traits import Traits
from fleetune.models.adapters import AXES, Axes
from fleetune.seeds import seed_of
from fleetune.tensors import Tensors, add_weighted
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.worker import Worker

FACTORS = ("lora_A", "lora_E", "lora_B")
INITIAL_DEVIATION = 0.02
"""Standard deviation of A and B at the start, as in the authors' code; the paper says "random Gaussian"."""


OWN_AXES: Axes = {
    **AXES,
    **{f"{factor}_{kept}": AXES[factor] for factor in FACTORS for kept in ("importance", "uncertainty")},
    "lora_score": AXES["lora_E"],
}
"""Moving averages have the shape of their factor, and a score belongs to each rank."""


class AdaLoRAConfig(MethodConfig):
    """Settings of AdaLoRA; the rank r with which every matrix begins is model.lora.rank."""

    name: Literal["adalora"] = "adalora"
    target_rank: int = Field(4, ge=1, le=1_000_000)
    """Mean rank of a matrix in the end: b_T is that times the number of matrices. model.lora.rank prunes nothing. The paper
    begins with 1.5 times the final budget."""
    initial_fraction: float = Field(0.1, ge=0, le=1)
    """Part of the rounds, at the beginning, that keep all triplets (t_i)."""
    final_fraction: float = Field(0.3, ge=0, le=1)
    """Part of the rounds, at the end, in which the triplets that are left do not change any more (t_f)."""
    beta1: float = Field(0.85, ge=0, lt=1)
    """Decay of the moving average of the importance."""
    beta2: float = Field(0.85, ge=0, lt=1)
    """Decay of the moving average of its uncertainty."""
    orthogonal_weight: float = Field(0.1, ge=0, le=1e6)
    """Weight gamma of the orthogonality term; the paper takes 0.1 to 0.5, PEFT 0.5."""

    @property
    def traits(self) -> Traits:
        """Every client keeps its moving averages."""
        return Traits(private=True)


class AdaLoRA(Method):
    """Server state: A, E and B of every site, and the budget of the last allocation."""

    Config = AdaLoRAConfig
    source: ClassVar[str] = "move a budget of ranks to where it matters (Zhang et al. 2023, arXiv 2303.10512)"
    axes: Axes = OWN_AXES

    def check(self) -> None:
        """Raises UserError if the budget would grow, or no round is left in which it shrinks."""
        config, rank = self.config, self.context.lora.rank
        if config.target_rank > rank:
            raise UserError(
                f"exceeds model.lora.rank={rank}, the rank with which every matrix begins",
                field="method.target_rank",
                value=config.target_rank,
                hint="lower it, or raise model.lora.rank",
            )
        if self.initial_rounds + self.final_rounds >= self.context.num_rounds:
            raise UserError(
                f"leaves none of {self.context.num_rounds} rounds to prune in, beside the last {self.final_rounds}",
                field="method.initial_fraction",
                value=config.initial_fraction,
                hint="lower it or method.final_fraction, or raise rounds.num_rounds",
            )

    # -- the budget -------------------------------------------------------------------------------------------------------
    @property
    def initial_rounds(self) -> int:
        """t_i."""
        return round(self.config.initial_fraction * self.context.num_rounds)

    @property
    def final_rounds(self) -> int:
        """t_f."""
        return round(self.config.final_fraction * self.context.num_rounds)

    def budget(self, rounds_done: int) -> int:
        """Triplets b(t) that are kept after so many rounds (equation 12), rounded down as in the authors' code.

        Counted in rounds and not in steps: with equally many steps in each round the fraction is the same.
        """
        first, last = (rank * len(self.context.sites) for rank in (self.context.lora.rank, self.config.target_rank))
        pruning_rounds = self.context.num_rounds - self.initial_rounds - self.final_rounds
        done = min(max((rounds_done - self.initial_rounds) / pruning_rounds, 0.0), 1.0)
        return int(last + (first - last) * (1 - done) ** 3)

    # -- server -----------------------------------------------------------------------------------------------------------
    def start(self) -> State:
        """A (r, in) and B (out, r) normal with a small deviation, E (r,) = 0: the model is the base model."""
        rank, tensors = self.context.lora.rank, {}
        for index, (site, (num_in, num_out)) in enumerate(self.context.sites.items()):
            generator = torch.Generator().manual_seed(seed_of(self.context.seed, "adalora-init", index))
            a, b = torch.empty(rank, num_in), torch.empty(num_out, rank)
            tensors[f"{site}.lora_A"] = a.normal_(std=INITIAL_DEVIATION, generator=generator)
            tensors[f"{site}.lora_E"] = torch.zeros(rank)
            tensors[f"{site}.lora_B"] = b.normal_(std=INITIAL_DEVIATION, generator=generator)
        return State(tensors, {"budget": self.budget(0), "triplets": 0, "is_fixed": False})

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The three factors, and whether the triplets that are left are fixed by now."""
        return Payload(state.tensors, {"is_fixed": state.values["is_fixed"]})

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """Average all factors and scores; then keep the b(t) triplets of largest score and set the other E to 0."""
        total: Tensors = {}
        for update in updates:
            add_weighted(total, update.tensors, update.weight)
        tensors = {name: total.get(name, tensor) for name, tensor in state.tensors.items()}
        values = self._values_after(state, round_idx)
        scores = {name: score for name, score in total.items() if name.endswith(".lora_score")}
        if scores:  # clients send none once the set is fixed
            for name, keep in largest(scores, values["budget"]).items():
                site = name.removesuffix(".lora_score")
                tensors[f"{site}.lora_E"] = tensors[f"{site}.lora_E"].masked_fill(~keep, 0.0)
        ranks = [t.count_nonzero() for name, t in tensors.items() if name.endswith(".lora_E")]
        return State(tensors, {**values, "triplets": int(sum(ranks))})

    def expected(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """As many triplets as the budget allows; a round of nobody allocates nothing."""
        if not any(True for _ in updates):
            return state
        values = self._values_after(state, round_idx)
        return State(state.tensors, {**values, "triplets": values["budget"]})

    def _values_after(self, state: State, round_idx: int) -> dict[str, Any]:
        """The budget after a round, and whether it was the last allocation."""
        is_last = round_idx + 1 >= self.context.num_rounds - self.final_rounds
        return {**state.values, "budget": self.budget(round_idx + 1), "is_fixed": is_last}

    def columns(self, state: State) -> dict[str, float]:
        """The budget of triplets, and how many have an E other than 0."""
        return {"budget": float(state.values["budget"]), "triplets": float(state.values["triplets"])}

    # -- client -----------------------------------------------------------------------------------------------------------
    def client_adapter(self, payload: Payload) -> Tensors:
        """The factors; before the set is fixed also moving averages and scores of 0, over which a client lays its own."""
        out = dict(payload.tensors)
        if payload.values["is_fixed"]:
            return out
        for name, tensor in payload.tensors.items():
            out[f"{name}_importance"] = torch.zeros_like(tensor)
            out[f"{name}_uncertainty"] = torch.zeros_like(tensor)
            if name.endswith(".lora_E"):
                out[f"{name.removesuffix('.lora_E')}.lora_score"] = torch.zeros_like(tensor)
        return out

    def local_plan(self, payload: Payload) -> LocalPlan:
        """Train the factors, send them and the scores, keep the moving averages."""
        is_fixed = payload.values["is_fixed"]
        return replace(
            super().local_plan(payload),
            trainable=_is_factor,
            uploads=lambda name: not _is_average(name),
            keeps=_is_average,
            penalty=self._not_orthogonal if self.config.orthogonal_weight else None,
            after_backward=_hold_pruned if is_fixed else self._score,
        )

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """The plan's work. Once the set is fixed nobody reads the averages that some of the clients still keep."""
        if payload.values["is_fixed"]:
            tasks = [replace(task, private=None) for task in tasks]
        return super().local_update(worker, payload, tasks)

    def _not_orthogonal(self, params: Tensors, start: Tensors) -> Tensor:
        """gamma · mean of ||A A^T - I||_F and ||B^T B - I||_F over all matrices of each client, (K,): equation 4.

        The norm is not squared, as in the authors' code; the paper squares it.
        """
        grams = [t @ t.mT if name.endswith(".lora_A") else t.mT @ t for name, t in params.items() if t.dim() == 3]
        stacked = torch.stack(grams)  # (matrices, K, r, r)
        identity = torch.eye(stacked.shape[-1], device=stacked.device)
        return self.config.orthogonal_weight * torch.linalg.matrix_norm(stacked - identity).mean(dim=0)

    def _score(self, trained: Tensors, grads: Tensors, untrained: Tensors, step: int) -> None:
        """Bring the moving averages up to date, and the triplets' scores made from them; all of n clients.

        The scores that go up are those of the client's last step, which nobody knows beforehand: so they are made in each.
        """
        for name, tensor in trained.items():
            site, _, factor = name.rpartition(".")
            mean, spread = untrained[f"{name}_importance"], untrained[f"{name}_uncertainty"]
            importance = (tensor * grads[name]).abs_()  # equation 8
            mean.lerp_(importance, 1 - self.config.beta1)  # equation 9
            spread.lerp_(importance.sub_(mean).abs_(), 1 - self.config.beta2)  # equation 10
            products = torch.mul(mean, spread, out=importance)  # equation 11
            score = untrained[f"{site}.lora_score"]  # (n, r)
            if factor == "lora_A":  # the first of a site's factors, (n, r, in)
                score.copy_(products.mean(dim=2))
            else:  # E (n, r) itself, and the mean of B (n, out, r) over its rows: equation 7
                score.add_(products if factor == "lora_E" else products.mean(dim=1))


def largest(scores: Tensors, budget: int) -> dict[str, Tensor]:
    """True for the ``budget`` largest scores (r,) of all sites together; of equal ones the first. {name: bool (r,)}."""
    flat = torch.cat(list(scores.values()))
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[torch.argsort(flat, descending=True, stable=True)[:budget]] = True
    return dict(zip(scores, keep.split([len(score) for score in scores.values()]), strict=True))


def _hold_pruned(trained: Tensors, grads: Tensors, untrained: Tensors, step: int) -> None:
    """Once the set is fixed, an E of 0 stays 0: its gradient is taken away."""
    for name, tensor in trained.items():
        if name.endswith(".lora_E"):
            grads[name].masked_fill_(tensor == 0, 0.0)


def _is_factor(name: str) -> bool:
    """True for A, E and B."""
    return name.endswith(tuple(f".{factor}" for factor in FACTORS))


def _is_average(name: str) -> bool:
    """True for the moving averages, which stay with the client."""
    return name.endswith(("_importance", "_uncertainty"))
