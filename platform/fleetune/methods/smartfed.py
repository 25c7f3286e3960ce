"""SmartFed: the ranks of adapters that exist already are experts, and a trained router chooses some of them for every token.

Wu, Li, Guo and Li 2025, "Don't Reinvent the Wheel, Just Realign the Spokes: Resource-Efficient Federated Fine-Tuning via
Rank-Wise Expert Assembly", ICML 2026, arXiv 2512.00902. No code is public; what the paper leaves open is a setting
(docs/methods/smartfed.md).

        E_i(x) = b_i <a_i, x>                                   rank i of the M = sum_n r_n ranks of all adapters at a matrix
        g = softmax(W x),  W (M, in)                            the router, near zero at first; x is the matrix's input
        y = W_0 x + sum_{i in the best q_j} s g_i E_i(x)        q_j: the quota of matrix j, of J
        I_i = E |dLoss / dm_i| at m_i = 1                       importance of a rank, m_i a factor of E_i, all ranks at work
        q = quotas(sum_i I_i of each matrix; B = K J, M)        algorithm 1 (`methods.expert_quotas`)

The first round measures importances: clients compute gradients, train nothing and send a number for each rank. In all others
they train the router and send it; the server averages (FedAvg).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fleetune.errors import UserError
from fleetune.methods.base import Context, Payload, State, Update
from fleetune.methods.expert_quotas import Residual, elastic_quotas
from fleetune.methods.gates import GateConfig, Gates, sites_of
from fleetune.seeds import seed_of
from fleetune.tensors import Tensors
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.worker import Worker


class SmartFedConfig(GateConfig):
    """Settings of SmartFed."""

    name: Literal["smartfed"] = "smartfed"
    quota: int | None = Field(None, ge=1, le=1_000_000)
    """K, the ranks that are computed for a token in each matrix on average. Default: model.lora.rank, as many as a method without
    reuse trains; the paper has 32 of 64."""
    experts: Literal["rank", "adapter"] = "rank"
    """What is chosen: single ranks, or whole adapters of one rank, which is the paper's ablation without rank-wise experts."""
    elastic: bool = True
    """Whether quotas follow importance (algorithm 1); false: K everywhere, which is its ablation without elastic quotas."""
    residual: Residual = "greedy"
    """Who gets what algorithm 1 has left over: the most important matrix until it is full, then the next, as printed; or each in
    turn."""
    importance_every: int = Field(0, ge=0, le=1_000_000)
    """Rounds after which importances are measured again, by a round that trains nothing; 0: in the first round alone."""
    router: Literal["matrix", "layer", "low-rank"] = "matrix"
    """A router for each matrix, one for all matrices of a block that reads the residual stream at its beginning, or one of low
    rank for each matrix."""
    router_rank: int = Field(8, ge=1, le=65_536)
    """Rank of low-rank routers."""
    router_std: float = Field(0.02, ge=0, le=1e3)
    """Standard deviation of the routers' first numbers. Small ones leave all gates nearly equal, and tokens begin with different
    experts; with 0 all tokens begin with the same ones, whichever the sort puts first among equals."""
    gates: Literal["kept", "all"] = "kept"
    """Whether the chosen experts' gates sum to 1 (softmax over their logits), or are their part of a softmax over all."""
    gate_scaling: Literal["sum", "literal"] = "sum"
    """s. ``sum``: equal gates are 1 each, so that all ranks chosen give the plain sum of the adapters; ``literal``: 1, as the
    formula is printed, which begins near the base model."""


class SmartFed(Gates):
    """Server state: the routers, and importances once they are measured, ``<site>.importance`` (M,); the quotas."""

    Config = SmartFedConfig
    config: SmartFedConfig
    source: ClassVar[str] = "a router over the ranks of existing adapters (Wu et al. 2025, arXiv 2512.00902)"
    plan_assumes = "smartfed's matrices are taken to be equally important, so that all have the same quota"

    def __init__(self, config: SmartFedConfig, context: Context):
        super().__init__(config, context)
        self._held: dict[tuple[int, ...], Tensors] = {}  # by quotas: the last one

    @property
    def per_matrix(self) -> int:
        """K."""
        return self.config.quota or self.context.lora.rank

    @property
    def caps(self) -> list[int]:
        """M of each matrix."""
        return [sum(ranks) for ranks in self.ranks.values()]

    @property
    def width(self) -> int:
        """Ranks of an expert."""
        return 1 if self.config.experts == "rank" else len(self.skills[0].tensors[f"{next(iter(self.ranks))}.lora_A"])

    def check(self) -> None:
        """The pool has room for the quota; whole adapters have one rank, of which the quota is a multiple."""
        super().check()
        config, smallest = self.config, min(self.caps)
        if self.per_matrix > smallest:
            raise self._wrong(f"exceeds the pool's {smallest} ranks", "lower it, or name further adapters")
        if config.experts == "adapter":
            found = {rank for ranks in self.ranks.values() for rank in ranks}
            if len(found) > 1:
                raise UserError(
                    f"needs adapters of one rank, and these have {', '.join(map(str, sorted(found)))}",
                    field="method.experts",
                    value=config.experts,
                    hint="set experts=rank, or name adapters of one rank",
                )
            if self.per_matrix % self.width:
                raise self._wrong(
                    f"is no multiple of the adapters' rank, {self.width}, and whole adapters are chosen",
                    f"set it to {self.width}, or experts=rank",
                )
        if config.router == "layer" and len({tuple(ranks) for ranks in self.ranks.values()}) > 1:
            raise UserError(
                "needs adapters that have one rank in all matrices",
                field="method.router",
                value=config.router,
                hint="set router=matrix",
            )

    def _wrong(self, rule: str, hint: str) -> UserError:
        """The quota breaks a rule; by default it is model.lora.rank."""
        if self.config.quota is None:
            hint = f"set method.quota: {hint}"
        return UserError(rule, field="method.quota", value=self.per_matrix, hint=hint)

    # -- server ---------------------------------------------------------------------------------------------------------
    def start(self) -> State:
        """Routers that are nearly zero, and the same quota everywhere."""
        config, hidden = self.config, self.context.base.shape.hidden_size
        experts = {site: cap // self.width for site, cap in zip(self.ranks, self.caps, strict=True)}
        tensors: Tensors = {}
        if config.router == "layer":
            count = next(iter(experts.values()))
            names = [f"layers.{block}.block_router" for block in range(self.context.num_layers)]
            tensors = {name: self._normal(name, config.router_std, count, hidden) for name in names}
        else:
            for site, count in experts.items():
                num_in, _ = self.context.sites[site]
                shapes = {"router": (count, num_in)}
                if config.router == "low-rank":
                    down = f"{site}.router_down"
                    tensors[down] = self._normal(down, num_in**-0.5, config.router_rank, num_in)
                    shapes = {"router_up": (count, config.router_rank)}
                for kind, shape in shapes.items():
                    tensors[f"{site}.{kind}"] = self._normal(f"{site}.{kind}", config.router_std, *shape)
        return State(tensors, {"quotas": [self.per_matrix // self.width] * len(experts), "is_measured": False})

    def _normal(self, name: str, std: float, *shape: int) -> Tensor:
        """Random numbers of a tensor's own address."""
        draws = torch.Generator().manual_seed(seed_of(self.context.seed, f"smartfed {name}"))
        return std * torch.empty(shape).normal_(generator=draws)

    def measures(self, state: State, round_idx: int) -> bool:
        """True if importances are measured in this round: they are not known yet, or are old enough."""
        every = self.config.importance_every
        return self.config.elastic and (
            not state.values["is_measured"] or (every > 0 and round_idx > 0 and round_idx % every == 0)
        )

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The routers; in a round that measures, nothing."""
        payload = super().broadcast(state, round_idx, group)
        if self.measures(state, round_idx):
            return replace(payload, tensors={}, held=self.pool, values={"measures": True})
        return payload

    def held(self, state: State) -> Tensors:
        """The pool, and for each matrix with a quota the factors s of its chosen experts (q,)."""
        config, quotas = self.config, state.values["quotas"]
        key = tuple(quotas)
        if key not in self._held:  # one object, so that a worker takes it up once
            kind = "kept_scale" if config.gates == "kept" else "pool_scale"
            scales = {}
            for site, quota, cap in zip(self.ranks, quotas, self.caps, strict=True):
                equal = quota if config.gates == "kept" else cap // self.width  # 1 / the gate of equal logits
                if quota:
                    scales[f"{site}.{kind}"] = torch.full(
                        (quota,), float(equal) if config.gate_scaling == "sum" else 1.0
                    )
            self._held = {key: {**self.pool, **scales}}
        return self._held[key]

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The mean routers, or the quotas that follow from the mean importances."""
        after = super().aggregate(state, updates, round_idx)
        if not self.measures(state, round_idx):
            return after
        importance = [float(after.tensors[f"{site}.importance"].double().sum()) for site in self.ranks]
        caps = [cap // self.width for cap in self.caps]
        quotas = elastic_quotas(importance, self.per_matrix // self.width, caps, residual=self.config.residual)
        return State(after.tensors, {"quotas": quotas, "is_measured": True})

    def expected(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """After the first round importances are measured, and taken to be equal."""
        return State(state.tensors, {**state.values, "is_measured": True})

    def activated(self, state: State) -> dict[str, int]:
        """{site: its quota, in ranks}."""
        return {site: self.width * quota for site, quota in zip(self.ranks, state.values["quotas"], strict=True)}

    def records(self, state: State) -> dict[str, Any]:
        """Also the importance of every rank."""
        names = [name for name in state.tensors if name.endswith(".importance")]
        found = {name.removesuffix(".importance"): state.tensors[name].tolist() for name in names}
        return {**super().records(state), **({"importance": found} if found else {})}

    # -- client ---------------------------------------------------------------------------------------------------------
    def client_adapter(self, payload: Payload) -> Tensors:
        """The routers; where importances are measured, a factor 1 for each rank and a place for its importance."""
        if not payload.values.get("measures"):
            return super().client_adapter(payload)
        out: Tensors = {}
        for site, count in pool_sizes(payload.held).items():
            out |= {f"{site}.expert_gate": torch.ones(count), f"{site}.importance": torch.zeros(count)}
        return out

    def num_gates(self, payload: Payload) -> dict[str, int]:
        """One for each expert."""
        per_adapter = super().num_gates(payload)
        return pool_sizes(payload.held) if self.config.experts == "rank" else per_adapter

    def local_plan(self, payload: Payload) -> LocalPlan:
        """Train and send the routers, or measure and send importances."""
        if not payload.values.get("measures"):
            return super().local_plan(payload)
        return LocalPlan(
            self.model(payload),
            trainable=lambda name: name.endswith(".expert_gate"),
            uploads=lambda name: name.endswith(".importance"),
            after_backward=note_importance,
        )

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """Where importances are measured, at a learning rate of 0: all factors stay 1."""
        if payload.values.get("measures"):
            tasks = [replace(task, learning_rate=0.0) for task in tasks]
        return super().local_update(worker, payload, tasks)


def note_importance(factors: Tensors, slopes: Tensors, frozen: Tensors, step: int) -> None:
    """The mean of |dLoss / dm_i| over the steps so far, each on a batch."""
    for name, slope in slopes.items():
        frozen[name.replace(".expert_gate", ".importance")].lerp_(slope.abs(), 1.0 / (step + 1))


def pool_sizes(held: Tensors) -> dict[str, int]:
    """{site: M}: the ranks of all adapters of a pool at each site."""
    adapters = [name.split(".")[1] for name in held if name.startswith("pool.")]
    count = max(map(int, adapters)) + 1
    return {site: sum(len(held[f"pool.{n}.{site}.lora_A"]) for n in range(count)) for site in sites_of(held)}
