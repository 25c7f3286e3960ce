"""What a federated method is: both sides in one class, its server state a value that goes in and comes out.

A round calls, in this order: `begin_round` (server), `broadcast` for each group of clients (server), `plan` and
`local_update` (client; in a worker process), `aggregate` (server). Most first-order methods only say what is different:
which tensors are trained, which travel, what is added to the loss. The engine does the rest, and knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from fleetune.config import Config
from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig
from fleetune.models.lora import init_lora
from fleetune.models.submodel import Submodel
from fleetune.tensors import Tensors, add_weighted, num_bytes
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.trainer import train_cohort
from fleetune.training.worker import Worker


@dataclass(frozen=True)
class State:
    """A method's server state: named tensors, and plain values that survive JSON. Replaced, never changed."""

    tensors: Tensors
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provision:
    """Weights that a client must hold for this payload; charged once, when the client sees ``key`` for the first time."""

    key: str
    num_bytes: int


@dataclass(frozen=True)
class Payload:
    """What the server sends to a group of clients: the tensors are charged to their downlink."""

    tensors: Tensors
    values: dict[str, Any] = field(default_factory=dict)
    server: Tensors = field(default_factory=dict)
    """State of the server that its own half needs while clients work (split learning); crosses no link."""
    provision: Provision | None = None

    @property
    def num_bytes(self) -> int:
        """What the link is charged for it."""
        return num_bytes(self.tensors)


@dataclass(frozen=True)
class Update:
    """What `aggregate` receives: the upload of one client, or a partial sum over many with their weights inside."""

    tensors: Tensors
    weight: float
    """What the tensors still have to be multiplied by: p_k of one client, 1 for a partial sum."""
    client_ids: tuple[int, ...]
    server: Tensors = field(default_factory=dict)
    group: Hashable = None
    """The clients' group, as `Method.group` gave it."""
    total_weight: float = 1.0
    """Sum of the clients' p_k, for a method that averages within groups; for one client its ``weight``."""


class ClientInfo(NamedTuple):
    """What the server knows of a client when it chooses what to send."""

    client_id: int
    device: str
    budget_bytes: float
    num_examples: int


@dataclass(frozen=True)
class GlobalModel:
    """What is evaluated or deployed: blocks and their adapter."""

    submodel: Submodel
    adapter: Tensors


PrivateStates = Callable[[], Iterator[tuple[int, int, Tensors]]]
"""(client id, number of examples, private tensors) of the clients that took part so far; for evaluation alone."""


@dataclass(frozen=True)
class Context:
    """What a method may look at: the base model, the adapter's form, the run's length and seed."""

    base: BaseModel
    lora: LoRAConfig
    sites: dict[str, tuple[int, int]]
    """{site: (in, out)} of all adapted linear layers of the whole model."""
    num_rounds: int
    seed: int

    @property
    def num_layers(self) -> int:
        """Blocks of the whole model."""
        return self.base.num_layers

    def fresh_adapter(self) -> Tensors:
        """The initial adapter of all layers: A random, B = 0."""
        return init_lora(self.sites, self.lora, run_seed=self.seed)


class MethodConfig(Config):
    """The method's part of a job file."""

    counts_blocks: ClassVar[tuple[str, ...]] = ()
    """Fields that count the model's blocks: with ``cost.model`` they are mapped by fraction of the depth."""

    name: str


class Method:
    """Base of all methods: average what clients upload, weighted by their numbers of examples (McMahan et al. 2017)."""

    Config: ClassVar[type[MethodConfig]]
    source: ClassVar[str]
    """One line for `fleetune list methods`: what it is and where it comes from."""
    partial_sums: ClassVar[bool] = True
    """Whether `aggregate` needs only weighted sums, which workers then form per unit; otherwise it gets each update."""

    draws_batches: ClassVar[bool] = True
    """Whether clients work on batches of their examples; methods that only compose or forward do not."""

    def __init__(self, config: Any, context: Context):
        self.config, self.context = config, context
        self.coupled = self.couples(config)

    @classmethod
    def couples(cls, config: Any) -> bool:
        """Whether all clients of a round must be worked on together (a shared server half)."""
        return False

    # -- server ---------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raise UserError where the configuration does not fit the model; called before any work starts."""

    def start(self) -> State:
        """The server's state before the first round."""
        return State(self.context.fresh_adapter())

    def stage(self, round_idx: int) -> int:
        """The stage that a round belongs to."""
        return 0

    def begin_round(self, state: State, round_idx: int) -> State:
        """Change of stage, if one is due; called before anything of the round is sent."""
        return state

    def group(self, client: ClientInfo) -> Hashable:
        """Clients of one group receive one payload. Default: all the same."""
        return None

    def broadcast(self, state: State, round_idx: int, group: Hashable) -> Payload:
        """What goes down to the clients of a group."""
        return Payload(state.tensors)

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The next state, from updates that arrive one by one in client order. Their weights sum to 1."""
        total: Tensors = {}
        for update in updates:
            add_weighted(total, update.tensors, update.weight)
        return State({**state.tensors, **total}, state.values)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """The model whose quality a round reports."""
        return GlobalModel(Submodel.prefix(self.context.num_layers), state.tensors)

    def deployed(self, state: State, private: PrivateStates) -> GlobalModel:
        """The model that is shipped in the end, an adapter for all blocks of the base."""
        return self.evaluated(state, private)

    def columns(self, state: State) -> dict[str, float]:
        """The method's own columns of rounds.parquet."""
        return {}

    def shrunk(self, payload: Payload, num_layers: int) -> Payload:
        """The payload for a client that holds only so many blocks; for methods that have submodels of any depth."""
        raise NotImplementedError

    def grown(self, upload: Tensors, payload: Payload) -> Tensors:
        """What an upload (or a weighted sum of them) for a payload that was `shrunk` says of all blocks."""
        return upload

    # -- client, in a worker process ------------------------------------------------------------------------------------
    def submodel(self, payload: Payload) -> Submodel:
        """The blocks that the payload is about; the whole model unless it says otherwise."""
        if "submodel" in payload.values:
            return Submodel.from_values(payload.values["submodel"])
        return Submodel.prefix(self.context.num_layers)

    def local_plan(self, payload: Payload) -> LocalPlan:
        """What the clients of this payload do."""
        return LocalPlan(self.submodel(payload))

    def client_adapter(self, payload: Payload) -> Tensors:
        """The adapter from which a client without private state starts."""
        return payload.tensors

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """The clients' work. Default: the shared trainer carries out the plan for the whole cohort at once."""
        plan = self.local_plan(payload)
        network = worker.network(plan.submodel)
        return train_cohort(network, plan, self.client_adapter(payload), tasks, data=worker.data, local=worker.local)


def is_lora_a(name: str) -> bool:
    """The down-projection A (r, in)."""
    return name.endswith(".lora_A")


def is_lora_b(name: str) -> bool:
    """The up-projection B (out, r)."""
    return name.endswith(".lora_B")


def zero_b(adapter_a: Tensors, sites: dict[str, tuple[int, int]]) -> Tensors:
    """B = 0 for every A of a (sub)model's adapter; layer n has the shapes of any other layer."""
    shapes = {site.split(".", 2)[2]: num_out for site, (_, num_out) in sites.items()}
    out: Tensors = {}
    for name, a in adapter_a.items():
        site = name.removesuffix(".lora_A")
        out[f"{site}.lora_B"] = torch.zeros(shapes[site.split(".", 2)[2]], a.shape[0], dtype=a.dtype, device=a.device)
    return out
