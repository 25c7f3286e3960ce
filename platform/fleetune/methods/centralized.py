"""Centralised fine-tuning: one model on all clients' data together, with as many steps as a federation takes.

Plain LoRA (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685), the reference that federated
methods are held against: what the same work comes to where data need not stay at home.

        a round       K · local.steps steps on batches of the pooled examples, K = rounds.clients_per_round
        a run         one loop of T K local.steps steps: AdamW's moments go on from round to round

A round is no more than the time between two evaluations, so that its curve has the federation's points. The server works alone:
nothing crosses a link, nobody is refused, and the costs are those of fleet.server. With SGD it is FedIT on one client that holds
all examples, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from fleetune.methods.base import GlobalModel, Method, MethodConfig, Payload, PrivateStates, State, Update
from fleetune.methods.traits import Traits
from fleetune.tensors import Stack, Tensors, add_weighted, select
from fleetune.training.config import LocalConfig
from fleetune.training.optimizer import Optimizer, make_optimizer, moments, restore_moments
from fleetune.training.plan import ClientTask, CohortUpdate
from fleetune.training.trainer import train_cohort
from fleetune.training.worker import Worker


class CentralizedConfig(MethodConfig):
    """Centralised training has no setting of its own."""

    name: Literal["centralized"] = "centralized"

    @property
    def traits(self) -> Traits:
        """One server holds all examples."""
        return Traits(pooled=True)


class Centralized(Method):
    """Server state: the adapter, and the optimizer's moments. They ride where the server's own half does in split learning."""

    Config = CentralizedConfig
    source: ClassVar[str] = (
        "no federation: all data on the server, as many steps (LoRA, Hu et al. 2022, arXiv 2106.09685)"
    )

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """Nothing is sent: adapter and moments are where they are needed."""
        return Payload({}, {"num_server_steps": state.values.get("num_server_steps", 0)}, server=state.tensors)

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """What the server's adapter and moments became."""
        server: Tensors = {}
        for update in updates:
            add_weighted(server, update.server, update.weight)
        values = dict(state.values)
        if "server.num_steps" in server:
            values["num_server_steps"] = int(server.pop("server.num_steps"))
        return State({**state.tensors, **server}, values)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """The adapter; the moments are no part of the model."""
        return GlobalModel(self.context.whole_model, select(state.tensors, _is_adapter))

    def client_adapter(self, payload: Payload) -> Tensors:
        """The adapter as it is."""
        return select(payload.server, _is_adapter)

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """The round's steps with an optimizer that goes on from the last round's moments."""
        plan, start = self.local_plan(payload), self.client_adapter(payload)
        shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
        made: list[Optimizer] = []

        def continued(local: LocalConfig, params: Tensor, learning_rates: Tensor) -> Optimizer:
            optimizer = make_optimizer(local, params, learning_rates)
            restore_moments(optimizer, payload.server, payload.values["num_server_steps"], Stack(shapes, params))
            made.append(optimizer)
            return optimizer

        network = worker.network(plan.model)
        update = train_cohort(network, plan, start, tasks, data=worker.data, local=worker.local, make=continued)
        assert update.upload is not None
        server = {**update.upload.client(0), **moments(made[0], update.upload)}
        return CohortUpdate(upload=None, losses=update.losses, num_tokens=update.num_tokens, server=server)


def _is_adapter(name: str) -> bool:
    """True for the adapter's tensors, which the moments' names come after (`moments`)."""
    return name.startswith("layers.")
