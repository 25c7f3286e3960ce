"""What a federated method is: both sides in one class, its server state a value that goes in and comes out.

A round calls, in this order: `begin_round` (server), `server_work`, `serve` and `served` as long as the server has work of its
own (in a worker process), `group` and `broadcast` for each group of clients (server), `local_plan` and `local_update` (client; in
a worker process), `summand` (in that worker, on the server's behalf), `aggregate` (server). Most first-order methods only say
what is different: which tensors are trained, which travel, what is added to the loss. The engine does the rest, and knows no
method by name.

Adapter tensors are named ``<site>.lora_A``, (r, in), and ``<site>.lora_B``, (out, r), with ``layers.<n>.…`` as site and blocks
counted from 0 within the (sub)model; `models.adapters` has the other kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from fleetune.config import Config
from fleetune.errors import UserError
from fleetune.methods.traits import Traits
from fleetune.models.adapters import AXES, Axes, cut
from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig
from fleetune.models.lora import init_lora
from fleetune.models.model import Model
from fleetune.models.submodel import Submodel
from fleetune.tensors import Stack, Tensors, add_weighted
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
    """What a client must have been sent before it can work on a payload. Its downlink is charged for what it lacks.

    Only names, shapes and types of the tensors are looked at, so they may lie on torch's meta device.
    """

    key: str
    """Name of the provision. The server remembers the last one of each client; who was sent this one lacks nothing."""
    missing: Callable[[str | None], Sequence[Tensors]]
    """Key of the provision that a client was sent last (None: it was sent none) -> what it lacks of this one, in each form in
    which it could be sent. The smallest form is charged."""


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
    held: Tensors = field(default_factory=dict)
    """Frozen tensors that clients hold beside the base's (`models.model.Model`). They cross no link with the payload: clients
    have them already, or make them themselves from what ``provision`` charges."""
    provision: Provision | None = None
    """Weights that the client needs beside the tensors, if it does not hold them yet."""


@dataclass(frozen=True)
class ServerWork:
    """A piece of the server's own work: steps over batches of examples, which a worker carries out, as it has model and data."""

    payload: Payload
    """All that the work depends on beside the base model and the examples. It crosses no link."""
    rows: np.ndarray
    """(steps, batch) int64: the examples of each step, as rows of the training examples; all steps are of one kind."""
    is_charged: bool = True
    """False for what is only measured, so that a method costs the same whether it is looked at or not."""


@dataclass(frozen=True)
class Update:
    """What `aggregate` receives, one after the other: the upload of one client, or a sum over many.

    With `Traits.partial_sums` (the default) a worker adds up sum_k p_k x_k over its clients of one payload, so that a round's
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
    ranks: tuple[int, ...] = ()
    """The rank of the adapter that each of ``client_ids`` trained."""
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
    category: int
    """The category that most of its examples have, 0 to `Context.num_categories` - 1."""


@dataclass(frozen=True)
class GlobalModel:
    """The model that is evaluated or deployed: what is frozen, and an adapter."""

    model: Model
    adapter: Tensors
    """Of all its blocks, which are counted from 0 within the submodel."""


MAIN = "main"
"""Of several models that a method names, the one whose quality is the run's."""


@dataclass(frozen=True)
class Report:
    """What a server knows of the run when a round begins."""

    sim_seconds: float
    """Virtual time at which the last round ended."""
    quality: Mapping[str, float] = field(default_factory=dict)
    """Of the last evaluated round: ``eval_loss``, ``eval_accuracy``, and ``eval_loss/<name>`` of each named model. Only for
    methods that wait for it (`Traits.waits`); empty before the first evaluation, and in a plan, which trains nothing."""


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
    num_categories: int = 1
    """Categories of the training examples, those that the partition goes by."""
    num_examples: int = 0
    """Training examples of all clients together: `ServerWork.rows` are below it."""
    evaluation_interval: int = 1
    """Rounds between evaluations: when round r begins, from 0, the one before it has been evaluated if this divides r."""

    @property
    def num_layers(self) -> int:
        """Blocks of the full model."""
        return self.base.num_layers

    @property
    def whole_model(self) -> Model:
        """All blocks of the base model."""
        return Model(Submodel.prefix(self.num_layers))

    def fresh_adapter(self) -> Tensors:
        """The initial adapter of all blocks: A (r, in) random, B (out, r) = 0."""
        return init_lora(self.sites, self.lora, run_seed=self.seed)


class MethodConfig(Config):
    """The method's part of a job file."""

    counts_blocks: ClassVar[tuple[str, ...]] = ()
    """Fields that count the model's blocks (`num_blocks`): with ``cost.model`` they are mapped by fraction of the depth."""

    name: str

    @property
    def traits(self) -> Traits:
        """What the method is like with these settings.

        A property of the settings and not of the method, as it decides how a job is spread over workers before any model is read.
        """
        return Traits()

    def check_job(self, job: Any) -> None:
        """Raises UserError if these settings contradict another part of the job, ``job``: a `fleetune.spec.RunSpec`.

        Called when a job file is read; what needs the model or the data is for `Method.check`.
        """

    def content(self) -> dict[str, str]:
        """Part -> digest of the files that these settings name and the method reads, as they are now, for the run's identity.

        A part begins with the field that names the file, as ``method.adapters/<file>``. Raises UserError if one is gone.
        """
        return {}


class Method:
    """Base of all methods: average what clients upload, weighted by their numbers of examples (McMahan et al. 2017)."""

    Config: ClassVar[type[MethodConfig]]
    """The method's settings, checked when the job is read."""
    source: ClassVar[str]
    """One line for `fleetune list methods`: what it is and where it comes from."""
    plan_assumes: ClassVar[str | None] = None
    """One line that a plan shows if later rounds depend on what only training can tell."""
    axes: Axes = AXES
    """What the axes of the method's tensors count, by the last part of their names. A method with tensors of its own kind adds
    them here, so that they can be cut to a smaller rank and costed on another architecture."""

    def __init__(self, config: Any, context: Context):
        self.config, self.context = config, context
        self.traits: Traits = config.traits

    # -- server ---------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raises UserError if the configuration does not fit the model; called before any work starts."""

    def content(self) -> dict[str, str]:
        """As `MethodConfig.content`, for files that the method has read by now: their digests when it read them."""
        return self.config.content()

    def start(self) -> State:
        """The server's state before the first round."""
        return State(self.context.fresh_adapter())

    def stage(self, round_idx: int) -> int:
        """The stage, from 0, that a round belongs to."""
        return 0

    def begin_round(self, state: State, round_idx: int, report: Report) -> State:
        """The state with which the round begins, in the next stage if one is due. Called before anything is sent."""
        return state

    def server_work(self, state: State, round_idx: int) -> ServerWork | None:
        """The next piece of the server's own work before this round begins; None if there is none (left).

        It is asked again after each piece, with the state that `served` made of the last one (`Traits.serves`).
        """
        return None

    def served(self, state: State, work: ServerWork, result: Tensors) -> State:
        """The state after a piece of the server's own work. ``result`` is what `serve` returned.

        In a plan, where nothing is worked out, it is empty: then the state has to be right as far as the sizes of payloads and
        what else is due depend on it.
        """
        raise NotImplementedError

    def drawn_from(self, state: State, round_idx: int) -> int:
        """The round whose clients and batches are used; an earlier one if the server asks again for work on the same examples."""
        return round_idx

    def group(self, client: ClientInfo) -> Hashable:
        """The client's group: clients of one group receive one payload. By default all are in one group."""
        return None

    def groups(self, state: State, round_idx: int, clients: Sequence[ClientInfo]) -> list[Hashable]:
        """The groups of a round's clients, which come by rising id. By default each client's own `group`; a method that deals
        clients out anew in every round does so here."""
        return [self.group(client) for client in clients]

    def turns(self, client_ids: np.ndarray, round_idx: int) -> list[int]:
        """Where clients work in turn (`Traits.in_turn`): their order, as places in ``client_ids (n,)``. Default: as they are.

        It must not depend on who else is among them, as refused clients are not asked again.
        """
        return list(range(len(client_ids)))

    def broadcast(self, state: State, round_idx: int, group: Hashable) -> Payload:
        """The payload for the clients of a group."""
        return Payload(state.tensors)

    def summand(self, payload: Payload, received: Stack, tasks: Sequence[ClientTask]) -> Stack:
        """What is summed over clients, (K, …), made of what the server received from K of them. Default: just that.

        It runs in the worker, so that a round's uploads need not lie in memory one beside the other; but it is the server's
        work, and clients are charged for neither its result nor its time.
        """
        return received

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The next state, from updates that arrive one by one, always in the same order. Their weights sum to 1."""
        total: Tensors = {}
        for update in updates:
            add_weighted(total, update.tensors, update.weight)
        return State({**state.tensors, **total}, state.values)

    def expected(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The state after a round, as far as the size of later payloads depends on it. A plan calls it in place of `aggregate`,
        with updates that have no tensors."""
        return state

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel | Mapping[str, GlobalModel]:
        """The model whose quality a round reports, or several by name.

        Each named model gets columns of its own; the run's are those of `MAIN` if it is there, else their mean.
        """
        return GlobalModel(self.context.whole_model, state.tensors)

    def personal(
        self, state: State, client: ClientInfo, private: Tensors, models: Mapping[str, GlobalModel]
    ) -> GlobalModel:
        """A client's own model, with which it is evaluated on the examples that it holds out (``evaluation.personal``).

        ``private``: the tensors that it keeps, empty if it has none. ``models``: what `evaluated` has just returned, by name, a
        single one as `MAIN`. Default: that one, as clients of most methods leave with the global model. Clients may share a
        model, and should then be given the same object.
        """
        if MAIN not in models:
            raise UserError(
                "the method evaluates several models and does not say which of them is a client's own",
                field="evaluation.personal",
                hint="give its class a method `personal`, or set evaluation.personal to none and data.held_out to 0",
            )
        return models[MAIN]

    def deployed(self, state: State, private: PrivateStates) -> GlobalModel:
        """The model that is shipped in the end, an adapter for all blocks of the base."""
        model = self.evaluated(state, private)
        if isinstance(model, GlobalModel):
            return model
        return model[MAIN] if MAIN in model else next(iter(model.values()))

    def columns(self, state: State) -> dict[str, float]:
        """The method's own columns of rounds.parquet, with their values for this round."""
        return {}

    def records(self, state: State) -> dict[str, Any]:
        """What is to be kept of a stage beside its rounds' columns, as plain data for ``method/stage_<n>.json``; {}: nothing.

        ``state``: after the stage's last round. It is asked once a stage, so it may take as long as a round does.
        """
        return {}

    def shrunk(self, payload: Payload, num_layers: int) -> Payload:
        """The payload for a client that holds only so many blocks; for methods that have submodels of any depth."""
        raise NotImplementedError

    def narrowed(self, payload: Payload, rank: int) -> Payload:
        """The payload for a client that trains only the first ``rank`` ranks of every adapter."""
        return replace(payload, tensors=cut(payload.tensors, rank, self.axes))

    def grown(self, upload: Tensors, payload: Payload) -> Tensors:
        """An upload (or a weighted sum of them) for a payload that was `shrunk`, given to all blocks of the unshrunk one."""
        return upload

    # -- client, in a worker process ------------------------------------------------------------------------------------
    def submodel(self, payload: Payload) -> Submodel:
        """The blocks that the payload is about; the full model unless it says otherwise."""
        if "submodel" in payload.values:
            return Submodel.from_values(payload.values["submodel"])
        return Submodel.prefix(self.context.num_layers)

    def model(self, payload: Payload) -> Model:
        """What the payload's clients hold: its blocks, and the frozen tensors beside them."""
        return Model(self.submodel(payload), payload.held)

    def local_plan(self, payload: Payload) -> LocalPlan:
        """What the clients of this payload do, as a value: for the trainer, and for the costs before it."""
        return LocalPlan(self.model(payload))

    def serve(self, worker: Worker, work: ServerWork) -> Tensors:
        """Carry out a piece of the server's own work, in a worker process. It takes the examples of step i as ``work.rows[i]``.

        Returns tensors on the CPU, for `served`.
        """
        raise NotImplementedError

    def client_adapter(self, payload: Payload) -> Tensors:
        """The adapter from which a client without private state starts."""
        return payload.tensors

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """The clients' work. By default the shared trainer carries out the plan for the full cohort at once, stacked."""
        plan = self.local_plan(payload)
        network = worker.network(plan.model)
        return train_cohort(network, plan, self.client_adapter(payload), tasks, data=worker.data, local=worker.local)


def num_blocks(value: int | float, depth: int) -> int:
    """Blocks that a setting means in a model of ``depth`` blocks: an integer is their number, a float a fraction of the depth.

    A fraction means the nearest number of blocks; a half goes up.
    """
    return value if isinstance(value, int) else math.floor(value * depth + 0.5)


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
