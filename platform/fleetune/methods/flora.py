"""FLoRA: clients' pairs are stacked, not averaged, so that what the server adds is exactly the mean of what they learnt.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024,
arXiv 2409.05976.

        client k      a fresh pair (A_k, B_k) of its own rank r_k on the model as it stands; trains it, sends it
        server        A = [p_1 A_1; …; p_K A_K],  B = [B_1 … B_K]        (equation 3: stacked along the rank)
                      W <- W + s B A = W + sum_k p_k s B_k A_k           (s = alpha / r of the job, for every rank)

The stack has rank sum_k r_k. It goes down to the clients, who add it to their copy of the base model, and the next round begins
with fresh pairs. Ranks may differ from client to client, because factors of unequal rank can be stacked.

Whoever missed rounds must fetch every stack since its last one, or the dense sum if that is smaller, before it can train again;
that is charged. The authors' code lets all clients take part in every round and needs no such rule.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fleetune.errors import UserError, unknown_name
from fleetune.methods.base import (
    ClientInfo,
    GlobalModel,
    Method,
    MethodConfig,
    Payload,
    PrivateStates,
    Provision,
    State,
    Update,
)
from fleetune.methods.traits import Traits
from fleetune.models.lora import init_lora
from fleetune.models.model import Model
from fleetune.models.submodel import Submodel
from fleetune.seeds import seed_of
from fleetune.tensors import Stack, Tensors, add_weighted
from fleetune.training.plan import ClientTask


class FLoRAConfig(MethodConfig):
    """Settings of FLoRA."""

    name: Literal["flora"] = "flora"
    ranks: dict[str, Annotated[int, Field(ge=1, le=65_536)]] = Field(default_factory=dict)
    """Rank of the clients on each device type, such as `{jetson-nano: 2, jetson-agx-orin-64gb: 16}`; model.lora.rank on those
    that are not named. The paper's mixed setting is 64, 32, 16, 16, 8, 8, 4, 4, 4, 4 for ten clients."""

    @property
    def traits(self) -> Traits:
        """Clients of one rank form a group."""
        return Traits(groups=bool(self.ranks))

    def check_job(self, job: Any) -> None:
        """Ranks are given to devices that the fleet has: a misspelt one would be trained at another rank in silence."""
        for device in self.ranks:
            if device not in job.fleet.devices:
                raise unknown_name("device in fleet.devices", device, job.fleet.devices, field="method.ranks")


class FLoRA(Method):
    """Server state: for every adapted matrix the sum of all stacks so far, and the rank of each round's stack."""

    Config = FLoRAConfig
    source: ClassVar[str] = "stack the clients' pairs into the base model (Wang et al. 2024, arXiv 2409.05976)"

    def check(self) -> None:
        """No rank is larger than a matrix can use."""
        largest = max(min(sizes) for sizes in self.context.sites.values())
        for device, rank in self.config.ranks.items():
            if rank > largest:
                raise UserError(
                    f"exceeds {largest}, the smaller side of the largest adapted matrix",
                    field=f"method.ranks.{device}",
                    value=rank,
                    hint="lower it",
                )

    # -- server ---------------------------------------------------------------------------------------------------------
    def start(self) -> State:
        """Nothing has been added to the base model."""
        deltas = {
            f"{site}.delta": torch.zeros(num_out, num_in) for site, (num_in, num_out) in self.context.sites.items()
        }
        return State(deltas, {"stacked": []})

    def group(self, client: ClientInfo) -> Hashable:
        """Clients of one rank are sent the same."""
        return self.config.ranks.get(client.device, self.context.lora.rank)

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The rank of the fresh pair. A client charges itself for the stacks that it lacks; it makes the pair from the seed."""
        values = {"round": round_idx, "rank": group or self.context.lora.rank}
        return Payload({}, values, held=state.tensors, provision=self._provision(state.values["stacked"]))

    def narrowed(self, payload: Payload, rank: int) -> Payload:
        """A fresh pair of a smaller rank."""
        return replace(payload, values={**payload.values, "rank": rank})

    def summand(self, payload: Payload, received: Stack, tasks: Sequence[ClientTask]) -> Stack:
        """s B_k A_k of each of K clients: their weighted sum is the product of the stacked factors (equation 3)."""
        pairs = received.views()
        sites = [name.removesuffix(".lora_A") for name in pairs if name.endswith(".lora_A")]
        products = [(pairs[f"{site}.lora_B"] @ pairs[f"{site}.lora_A"]).flatten(1) for site in sites]  # (K, out in)
        shapes = {
            f"{site}.delta": (pairs[f"{site}.lora_B"].shape[1], pairs[f"{site}.lora_A"].shape[2]) for site in sites
        }
        return Stack(shapes, torch.cat(products, dim=1).mul_(self.context.lora.scaling))

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """W <- W + sum_k p_k s B_k A_k."""
        total: Tensors = {}
        rank = 0
        for update in updates:
            add_weighted(total, update.tensors, update.weight)
            rank += sum(update.ranks)
        tensors = {name: tensor + total[name] if name in total else tensor for name, tensor in state.tensors.items()}
        return State(tensors, _stacked(state, rank))

    def expected(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """One more stack, of the rank that all updates have together."""
        return State(state.tensors, _stacked(state, sum(sum(update.ranks) for update in updates)))

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """The base model with all stacks added."""
        return GlobalModel(Model(Submodel.prefix(self.context.num_layers), state.tensors), {})

    def columns(self, state: State) -> dict[str, float]:
        """Rank of the last stack."""
        return {"stacked_rank": float(state.values["stacked"][-1] if state.values["stacked"] else 0)}

    def _provision(self, stacked: list[int]) -> Provision | None:
        """All stacks so far; a client lacks those that came after its last one."""
        if not stacked:
            return None

        def missing(last: str | None) -> list[Tensors]:
            rank = sum(stacked[0 if last is None else int(last) :])
            stack, dense = {}, {}
            for site, (num_in, num_out) in self.context.sites.items():
                stack[f"{site}.lora_A"] = torch.empty(rank, num_in, device="meta")
                stack[f"{site}.lora_B"] = torch.empty(num_out, rank, device="meta")
                dense[f"{site}.delta"] = torch.empty(num_out, num_in, device="meta")
            return [stack, dense]

        return Provision(str(len(stacked)), missing)

    # -- client ---------------------------------------------------------------------------------------------------------
    def client_adapter(self, payload: Payload) -> Tensors:
        """The round's fresh pair: A random, the same for all clients of a rank, and B = 0."""
        lora = self.context.lora.model_copy(update={"rank": payload.values["rank"]})
        return init_lora(
            self.context.sites, lora, run_seed=seed_of(self.context.seed, "flora", payload.values["round"])
        )


def _stacked(state: State, rank: int) -> dict[str, Any]:
    """The ranks of all stacks, with one more of a rank; a round of no clients adds none."""
    return {"stacked": [*state.values["stacked"], rank] if rank else state.values["stacked"]}
