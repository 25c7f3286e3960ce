"""What a federated method is: both sides in one class, its server state a value that goes in and comes out.

A round calls, in this order: `begin_round` (server), `group` and `broadcast` for each group of clients (server), `local_plan`
and `local_update` (client; in a worker process), `aggregate` (server). Most first-order methods only say what is different:
which tensors are trained, which travel, what is added to the loss. The engine does the rest, and knows no method by name.

Adapter tensors are named ``<site>.lora_A``, (r, in), and ``<site>.lora_B``, (out, r), with ``layers.<n>.…`` as site and blocks
counted from 0 within the (sub)model.
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
    """A method's server state, which goes from round to round and into the checkpoint.

    It is replaced and never changed in place: the engine may still need the one before, if a round has to be worked out again
    or comes to nothing.
    """

    tensors: Tensors
    """Named tensors in the method's own shapes, on the CPU; for most methods the global adapter."""
    values: dict[str, Any] = field(default_factory=dict)
    """Plain values that survive JSON."""


@dataclass(frozen=True)
class Provision:
    """Weights that a client must hold for this payload; charged once, when the client sees ``key`` for the first time."""

    key: str
    """Name of the weights. The server remembers the last one of each client."""
    num_bytes: int
    """Bytes on the client's downlink."""


@dataclass(frozen=True)
class Payload:
    """What the server sends to a group of clients: made by `broadcast`, read by all methods of the client side.

    The same object serves to price the round before it is worked on, so it must say all that the work depends on.
    """

    tensors: Tensors
    """What travels, and is charged to the clients' downlink; for most methods the adapter from which they start."""
    values: dict[str, Any] = field(default_factory=dict)
    """Plain values that tell the client side what to do (``submodel``, a step count); they are not charged."""
    server: Tensors = field(default_factory=dict)
    """State of the server that its own half needs while clients work (split learning); crosses no link."""
    provision: Provision | None = None
    """Weights that the client needs beside the tensors, if it does not hold them yet."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, which is what each client's downlink is charged for."""
        return num_bytes(self.tensors)


@dataclass(frozen=True)
class Update:
    """What `aggregate` receives, one after the other: the upload of one client, or a sum over many.

    With `Method.partial_sums` (the default) a worker adds up sum_k p_k x_k over its clients of one payload, so that a round's
    uploads never have to be in memory together; otherwise each client's upload comes by itself. A method that only takes a
    weighted average needs no more than ``tensors`` times ``weight`` of either.
    """

    tensors: Tensors
    """The upload at full rank and depth: the names and shapes that the method's `local_update` gave it."""
    weight: float
    """The factor that the tensors still have to be multiplied by: p_k = n_k / sum n of one client, 1 for a sum."""
    client_ids: tuple[int, ...]
    """The clients that it comes from; late and failed ones are not among them."""
    server: Tensors = field(default_factory=dict)
    """What the server's half became while these and other clients worked (split learning). It rides on the first update of a
    work unit and is empty in the others, so that adding them all up counts it once."""
    group: Hashable = None
    """The clients' group, as `Method.group` gave it."""
    total_weight: float = 1.0
    """Sum of the clients' p_k, for a method that averages within groups; for one client its ``weight``."""


class ClientInfo(NamedTuple):
    """What the server knows of a client when `Method.group` chooses what to send."""

    client_id: int
    device: str
    """Name of the device class."""
    budget_bytes: float
    """Bytes of memory that the client may use."""
    num_examples: int
    """n_k: training examples in its shard."""


@dataclass(frozen=True)
class GlobalModel:
    """The model that is evaluated or deployed: blocks and their adapter."""

    submodel: Submodel
    adapter: Tensors
    """Of all its blocks, which are counted from 0 within the submodel."""


PrivateStates = Callable[[], Iterator[tuple[int, int, Tensors]]]
"""Call it to read (client id, number of examples n_k, private tensors) of the clients that took part so far.

A function, because reading them all from the disk is only worth it for methods whose global model needs them. In a real
federation the server could not do so: it serves evaluation alone.
"""


@dataclass(frozen=True)
class Context:
    """What a method may look at: the base model, the adapter's form, the run's length and seed."""

    base: BaseModel
    """The frozen model; in a plan or a trace of costs its weights may be shapes without data."""
    lora: LoRAConfig
    sites: dict[str, tuple[int, int]]
    """{site: (in, out)} of all adapted linear layers of the full model."""
    num_rounds: int
    seed: int
    """The run's seed; a method's own draws begin their addresses with it."""

    @property
    def num_layers(self) -> int:
        """Blocks of the full model."""
        return self.base.num_layers

    def fresh_adapter(self) -> Tensors:
        """The initial adapter of all blocks: A (r, in) random, B (out, r) = 0."""
        return init_lora(self.sites, self.lora, run_seed=self.seed)


class MethodConfig(Config):
    """The method's part of a job file."""

    counts_blocks: ClassVar[tuple[str, ...]] = ()
    """Fields that count the model's blocks: with ``cost.model`` they are mapped by fraction of the depth."""

    name: str

    @property
    def coupled(self) -> bool:
        """True if all clients of a round must be worked on together, because they share a server's half.

        A property of the settings and not of the method, as it decides how a job is spread over workers before any model is read.
        """
        return False


class Method:
    """Base of all methods: average what clients upload, weighted by their numbers of examples (McMahan et al. 2017)."""

    Config: ClassVar[type[MethodConfig]]
    """The method's settings, checked when the job is read."""
    source: ClassVar[str]
    """One line for `fleetune list methods`: what it is and where it comes from."""
    partial_sums: ClassVar[bool] = True
    """True if `aggregate` needs only weighted sums, which workers then form per unit; otherwise it gets each client's update."""
    draws_batches: ClassVar[bool] = True
    """True if clients work on batches of their examples; methods that only compose or forward do not."""

    def __init__(self, config: Any, context: Context):
        self.config, self.context = config, context

    # -- server ---------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raises UserError if the configuration does not fit the model; called before any work starts."""

    def start(self) -> State:
        """The server's state before the first round."""
        return State(self.context.fresh_adapter())

    def stage(self, round_idx: int) -> int:
        """The stage, from 0, that a round belongs to."""
        return 0

    def begin_round(self, state: State, round_idx: int) -> State:
        """The state with which the round begins, in the next stage if one is due. Called before anything is sent."""
        return state

    def group(self, client: ClientInfo) -> Hashable:
        """The client's group: clients of one group receive one payload. By default all are in one group."""
        return None

    def broadcast(self, state: State, round_idx: int, group: Hashable) -> Payload:
        """The payload for the clients of a group."""
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
        """The method's own columns of rounds.parquet, with their values for this round."""
        return {}

    def shrunk(self, payload: Payload, num_layers: int) -> Payload:
        """The payload for a client that holds only so many blocks; for methods that have submodels of any depth."""
        raise NotImplementedError

    def grown(self, upload: Tensors, payload: Payload) -> Tensors:
        """An upload (or a weighted sum of them) for a payload that was `shrunk`, given to all blocks of the unshrunk one."""
        return upload

    # -- client, in a worker process ------------------------------------------------------------------------------------
    def submodel(self, payload: Payload) -> Submodel:
        """The blocks that the payload is about; the full model unless it says otherwise."""
        if "submodel" in payload.values:
            return Submodel.from_values(payload.values["submodel"])
        return Submodel.prefix(self.context.num_layers)

    def local_plan(self, payload: Payload) -> LocalPlan:
        """What the clients of this payload do, as a value: for the trainer, and for the costs before it."""
        return LocalPlan(self.submodel(payload))

    def client_adapter(self, payload: Payload) -> Tensors:
        """The adapter from which a client without private state starts."""
        return payload.tensors

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """The clients' work. By default the shared trainer carries out the plan for the full cohort at once, stacked."""
        plan = self.local_plan(payload)
        network = worker.network(plan.submodel)
        return train_cohort(network, plan, self.client_adapter(payload), tasks, data=worker.data, local=worker.local)


def is_lora_a(name: str) -> bool:
    """True for a down-projection A (r, in)."""
    return name.endswith(".lora_A")


def is_lora_b(name: str) -> bool:
    """True for an up-projection B (out, r)."""
    return name.endswith(".lora_B")


def zero_b(adapter_a: Tensors, sites: dict[str, tuple[int, int]]) -> Tensors:
    """B = 0, (out, r), for every A, (r, in), of a (sub)model's adapter. ``sites``: {site: (in, out)} of the full model.

    A submodel counts its blocks anew, so a site is looked up by its name within the block: all blocks have the same shapes.
    """
    shapes = {site.split(".", 2)[2]: num_out for site, (_, num_out) in sites.items()}
    out: Tensors = {}
    for name, a in adapter_a.items():
        site = name.removesuffix(".lora_A")
        out[f"{site}.lora_B"] = torch.zeros(shapes[site.split(".", 2)[2]], a.shape[0], dtype=a.dtype, device=a.device)
    return out
