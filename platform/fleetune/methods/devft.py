"""DevFT: developmental federated tuning, a model that grows in stages.

"Developmental Federated Tuning: A Cognitive-Inspired Paradigm for Efficient LLM Adaptation", ICLR 2026, arXiv 2508.00041.

Stage s trains a submodel of L_s blocks (L_s = initial capacity x growth rate^s, at most L):

1. DGLG groups the L blocks: spectral clustering of the cosine similarity of their flattened parameters, adapters included.
2. DBLF fuses each group into one block around its first one: theta_a + beta sum_j (theta_j - theta_a).
3. Clients tune the submodel's adapter under another method's rule (FedIT by default, FedSA-LoRA, FedProx, DoFIT).
4. At the stage's end each fused block's adapter is written back to every block of its group.

The last stage holds every block by itself, so it is the inner method on the full model. Where the paper is silent we take
stages of equal length, re-group from base and adapter at each stage's start, and fuse A and B separately (`growth`,
`layer_groups`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from fleetune.methods.base import (
    ClientInfo,
    GlobalModel,
    Method,
    MethodConfig,
    Payload,
    PrivateStates,
    Provision,
    Report,
    ServerWork,
    State,
    Update,
)
from fleetune.methods.growth import GrowthSettings, capacities, check_growth, stage_starts
from fleetune.methods.layer_groups import Groups, GroupSettings, check_groups, fuse, group_layers
from fleetune.methods.stage_record import stage_record
from fleetune.methods.traits import Traits
from fleetune.methods.wrapping import INNER, block_first, inner_fields, inner_settings, own_name
from fleetune.models.submodel import Submodel
from fleetune.tensors import Stack, Tensors
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.worker import Worker


class DevFTConfig(GrowthSettings, GroupSettings):
    """Settings of DevFT."""

    counts_blocks: ClassVar[tuple[str, ...]] = ("initial_capacity",)

    name: Literal["devft"] = "devft"
    aggregation: Literal["dofit", "fedavg", "fedit", "fedprox", "fedsa-lora"] = "fedit"
    """The method whose rule the clients and the server follow inside a stage."""
    inner: dict[str, Any] = Field(default_factory=dict)
    """Settings of that method, such as `{mu: 0.1}` for fedprox."""
    ship_submodel: bool = False
    """Charge each client for downloading the stage's fused weights. Off: devices hold the base model, as with every other
    method, and fuse it themselves from the groups and beta."""

    @property
    def inner_settings(self) -> MethodConfig:
        """The inner method's settings."""
        return inner_settings(self.aggregation, self.inner)

    @model_validator(mode="after")
    def _inner_method_takes_them(self) -> DevFTConfig:
        inner_settings(self.aggregation, self.inner)  # raises UserError for the first mistake
        return self

    @property
    def traits(self) -> Traits:
        """Those of the inner method."""
        return self.inner_settings.traits

    def check_job(self, job: Any) -> None:
        """As the inner method's settings demand."""
        with inner_fields():
            self.inner_settings.check_job(job)


class DevFT(Method):
    """Wraps another method: that one sees the stage's submodel as its model."""

    Config = DevFTConfig
    source: ClassVar[str] = "grow the model in stages of fused layer groups (ICLR 2026, arXiv 2508.00041)"

    def __init__(self, config: Any, context: Any):
        super().__init__(config, context)
        self.inner = INNER[config.aggregation](config.inner_settings, context)
        self.axes = self.inner.axes
        self.capacities = capacities(config.initial_capacity, config.growth_rate, context.num_layers)

    def check(self) -> None:
        """Raises UserError unless the stages fit the model and the run, the options agree, and the inner method fits."""
        with inner_fields():
            self.inner.check()
        check_growth(self.config, self.context.num_layers, self.context.num_rounds)
        check_groups(self.config)

    # -- server ---------------------------------------------------------------------------------------------------------
    def stage(self, round_idx: int) -> int:
        """The last stage that has begun by this round."""
        starts = stage_starts(len(self.capacities), self.context.num_rounds, self.config.stage_lengths)
        return bisect_right(starts, round_idx) - 1

    def start(self) -> State:
        """The adapter of all blocks, under ``global.``. Stage -1: the first stage's own is made when the first round begins.

        Names begin with their block (`block_first`), also where the inner method puts something before it.
        """
        inner = self.inner.start()
        tensors = {f"global.{block_first(n)}": t for n, t in inner.tensors.items()}
        return State(tensors, {"stage": -1, "groups": [], "inner": inner.values})

    def begin_round(self, state: State, round_idx: int, report: Report) -> State:
        """In a stage's first round: write the former stage's adapter back, group the blocks anew, and fuse them.

        The state then holds the adapter of all blocks as it was at the stage's beginning (``global.``) and that of the submodel
        (``stage.``), which is all that the stage's rounds change.
        """
        stage = self.stage(round_idx)
        if stage == state.values["stage"]:
            return state
        full = self._written_back(state)
        base, seed = self.context.base, self.context.seed
        groups = group_layers(base, full, self.capacities[stage], self.config, run_seed=seed, stage=stage)
        submodel = fuse(groups, fusion=self.config.fusion, beta=self.config.beta, run_seed=seed)
        tensors = {f"global.{n}": t for n, t in full.items()}
        tensors.update({f"stage.{n}": t.clone() for n, t in submodel.fuse_adapter(full).items()})
        values = {"stage": stage, "groups": groups, "submodel": submodel.to_values(), "inner": state.values["inner"]}
        return State(tensors, values)

    def server_work(self, state: State, round_idx: int) -> ServerWork | None:
        """What the inner method's server has to do, on the stage's submodel."""
        work = self.inner.server_work(self._inner_state(state), round_idx)
        if work is None:
            return None
        values = {**work.payload.values, "submodel": state.values["submodel"], "groups": state.values["groups"]}
        return replace(work, payload=replace(work.payload, values=values))

    def served(self, state: State, work: ServerWork, result: Tensors) -> State:
        """What the inner method makes of it."""
        return _with_inner(state, self.inner.served(self._inner_state(state), work, result))

    def group(self, client: ClientInfo) -> Hashable:
        """As the inner method groups clients."""
        return self.inner.group(client)

    def groups(self, state: State, round_idx: int, clients: Sequence[ClientInfo]) -> list[Hashable]:
        """As the inner method deals clients out."""
        return self.inner.groups(self._inner_state(state), round_idx, clients)

    def drawn_from(self, state: State, round_idx: int) -> int:
        """As the inner method says."""
        return self.inner.drawn_from(self._inner_state(state), round_idx)

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The inner method's payload, with the stage's groups."""
        payload = self.inner.broadcast(self._inner_state(state), round_idx, group)
        values = {**payload.values, "submodel": state.values["submodel"], "groups": state.values["groups"]}
        provision = None
        if self.config.ship_submodel:
            provision = self._weights(f"stage-{state.values['stage']}", len(state.values["groups"]))
        return replace(payload, values=values, provision=provision)

    def summand(self, payload: Payload, received: Stack, tasks: Sequence[ClientTask]) -> Stack:
        """As the inner method sums."""
        return self.inner.summand(payload, received, tasks)

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The inner method's rule on the stage's adapter."""
        inner = self.inner.aggregate(self._inner_state(state), updates, round_idx)
        return _with_inner(state, inner)

    def expected(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """As the inner method expects it of the stage's adapter."""
        inner = self.inner.expected(self._inner_state(state), updates, round_idx)
        return State(state.tensors, {**state.values, "inner": inner.values})

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel | Mapping[str, GlobalModel]:
        """The stage's submodel, which is what clients train; in the last stage the full model."""
        if state.values["stage"] < 0:
            return self.deployed(state, private)
        submodel = Submodel.from_values(state.values["submodel"])

        def fused() -> Iterator[tuple[int, int, Tensors]]:
            for client_id, num_examples, tensors in private():
                yield client_id, num_examples, submodel.fuse_adapter(tensors)

        found = self.inner.evaluated(self._inner_state(state), fused)
        if isinstance(found, GlobalModel):
            return _on(submodel, found)
        return {name: _on(submodel, model) for name, model in found.items()}

    def personal(
        self, state: State, client: ClientInfo, private: Tensors, models: Mapping[str, GlobalModel]
    ) -> GlobalModel:
        """The inner method's, on the stage's submodel."""
        submodel = Submodel.from_values(state.values["submodel"])
        fused = submodel.fuse_adapter(private) if private else {}
        own = self.inner.personal(self._inner_state(state), client, fused, models)
        return _on(submodel, own)

    def deployed(self, state: State, private: PrivateStates) -> GlobalModel:
        """All blocks, each with the adapter of its group."""
        whole = {own_name(n): t for n, t in self._written_back(state).items()}
        return self.inner.deployed(State(whole, state.values["inner"]), private)

    def columns(self, state: State) -> dict[str, float]:
        """Blocks of the stage's submodel, and the inner method's own."""
        depth = float(len(state.values["groups"]) or self.context.num_layers)
        return {**self.inner.columns(self._inner_state(state)), "depth": depth}

    def records(self, state: State) -> dict[str, Any]:
        """The stage's groups, the similarities of all blocks when it began, and how far each group's adapter has moved."""
        if state.values["stage"] < 0:
            return {}
        full = {n.removeprefix("global."): t for n, t in state.tensors.items() if n.startswith("global.")}
        return stage_record(self.context.base, self.config, state.values, full, _of_stage(state))

    def shrunk(self, payload: Payload, num_layers: int) -> Payload:
        """The payload with neighbouring groups of the stage merged into ``num_layers``, fused by the stage's rule.

        ``merged`` counts the stage's blocks, ``fused`` the base's: the client builds its blocks from the base by the latter, and
        the server gives its upload back to the stage's blocks by the former (`grown`).
        """
        groups: Groups = payload.values["groups"]
        merged = [part.tolist() for part in np.array_split(np.arange(len(groups)), num_layers)]
        fused = [[j for n in part for j in groups[n]] for part in merged]
        # A merged group takes its first block, as it would not draw the one whose adapter it holds.
        fusion = "r_one" if self.config.fusion == "random_one" else self.config.fusion
        rule = {"fusion": fusion, "beta": self.config.beta}
        values = {"submodel": fuse(fused, **rule).to_values(), "groups": fused, "merged": merged}
        provision = payload.provision
        if provision is not None:
            provision = self._weights(f"{provision.key}-{num_layers}", num_layers)
        tensors = fuse(merged, **rule).fuse_adapter(payload.tensors)
        return replace(payload, tensors=tensors, values={**payload.values, **values}, provision=provision)

    def narrowed(self, payload: Payload, rank: int) -> Payload:
        """As the inner method cuts ranks."""
        return self.inner.narrowed(payload, rank)

    def grown(self, upload: Tensors, payload: Payload) -> Tensors:
        """Every block of the stage gets the adapter of the block that it was merged into, as blocks do at a stage's end."""
        return write_back(upload, payload.values["merged"])

    # -- client ---------------------------------------------------------------------------------------------------------
    def local_plan(self, payload: Payload) -> LocalPlan:
        """The inner method's plan; its submodel is the stage's."""
        return self.inner.local_plan(payload)

    def serve(self, worker: Worker, work: ServerWork) -> Tensors:
        """The work of the inner method's server."""
        return self.inner.serve(worker, work)

    def client_adapter(self, payload: Payload) -> Tensors:
        """As the inner method starts a client."""
        return self.inner.client_adapter(payload)

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """The inner method's work. Private tensors are stored for all blocks, so that they outlive the stage and its groups."""
        submodel = self.submodel(payload)
        fused = [t if t.private is None else replace(t, private=submodel.fuse_adapter(t.private)) for t in tasks]
        update = self.inner.local_update(worker, payload, fused)
        if update.private is not None:
            stored = [write_back(update.private.client(k), payload.values["groups"]) for k in range(len(tasks))]
            update.private = Stack.of(stored)
        return update

    # -- parts ----------------------------------------------------------------------------------------------------------
    def _inner_state(self, state: State) -> State:
        """The stage as the inner method knows it, under its own names."""
        return State({own_name(n): t for n, t in _of_stage(state).items()}, state.values["inner"])

    def _written_back(self, state: State) -> Tensors:
        """The adapter of all blocks as the stage has left it."""
        if state.values["stage"] < 0:
            return {n.removeprefix("global."): t for n, t in state.tensors.items()}
        return write_back(_of_stage(state), state.values["groups"])

    def _weights(self, key: str, num_blocks: int) -> Provision:
        """The fused weights of so many blocks as a download; all blocks have the sizes of the base's first."""
        first = {n: w for n, w in self.context.base.weights.items() if n.startswith("model.layers.0.")}
        named = {
            n.replace(".layers.0.", f".layers.{block}.", 1): w for block in range(num_blocks) for n, w in first.items()
        }
        return Provision(key, lambda last: [named])


def _of_stage(state: State) -> Tensors:
    """The tensors of the stage's blocks, each name beginning with its block."""
    return {n.removeprefix("stage."): t for n, t in state.tensors.items() if n.startswith("stage.")}


def _with_inner(state: State, inner: State) -> State:
    """The state with what the inner method has made of the stage."""
    tensors = {n: t for n, t in state.tensors.items() if n.startswith("global.")}
    tensors.update({f"stage.{block_first(n)}": t for n, t in inner.tensors.items()})
    return State(tensors, {**state.values, "inner": inner.values})


def _on(submodel: Submodel, found: GlobalModel) -> GlobalModel:
    """What the inner method evaluates, on the stage's blocks."""
    return GlobalModel(replace(found.model, submodel=submodel), found.adapter)


def write_back(adapter: Tensors, groups: Groups) -> Tensors:
    """The submodel's adapter given to every block of each group: layers.<n>.x -> layers.<j>.x for j in group n."""
    out: dict[int, Tensors] = {}
    for name, tensor in adapter.items():
        _, position, suffix = name.split(".", 2)
        for j in groups[int(position)]:
            out.setdefault(j, {})[f"layers.{j}.{suffix}"] = tensor.clone()
    return {name: tensor for j in sorted(out) for name, tensor in out[j].items()}
