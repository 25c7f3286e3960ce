"""The family of split learning: the model is cut, the client holds the first blocks, the server the rest.

        client k                                  server
        embed, blocks [0, c) with Theta_k  ──S_k──►  blocks [c, L) with Phi, norm, head, loss
                 ▲                        ◄─dL/dS_k──            │
              step Theta_k                                    step Phi

Activations, labels and gradients are real tensors that cross the cut, and each is charged to its client (`split_round`). Methods
differ in whether client halves learn, who shares them, and how the server's half learns from several clients. With
``head: client`` norm, head and labels stay on the client: hidden states of the last block come down, their gradients go up.

What a method of the family may override: `SplitConfig.serving`, and of `SplitMethod` its `paths`, `loss`, `serving_order` and
`Round`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from fleetune.errors import UserError
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
    num_blocks,
)
from fleetune.methods.split_round import PERIOD, Batch, Path, SplitRound
from fleetune.methods.traits import Traits
from fleetune.models.network import Network
from fleetune.seeds import seed_of
from fleetune.tensors import Tensors, add_weighted, select, weighted_sum
from fleetune.training.loss import cohort_loss
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan, none
from fleetune.training.wire import CutPrecision
from fleetune.training.worker import Worker

Serving = Literal["concatenated", "in_turn", "per_client"]


class SplitConfig(MethodConfig):
    """Settings of all methods that cut the model."""

    counts_blocks: ClassVar[tuple[str, ...]] = ("split_point",)

    split_point: int | float = Field(4, gt=0, le=10_000)
    """Blocks on the client; the cut is after them. An integer is their number, a number below 1 a fraction of the depth: the
    nearest block."""
    cut_precision: CutPrecision = "same"
    """Form of activations and gradients on the wire, both ways: that of the computation; fp16; or int8 with a scale of 4 bytes
    per token. What is rounded away is lost to the training."""
    head: Literal["server", "client"] = "server"
    """Who holds the final norm and the head. On the client labels stay there, but every step sends as much again over a second
    cut, after the last block."""
    pipelined: bool = False
    """Client, links and server work on different micro-batches of a step at once, instead of one after the other. Gradients
    are summed, so the result is the same; the steps take as long as the slowest of them."""

    @field_validator("split_point")
    @classmethod
    def _is_number_or_fraction(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError(f"must be an integer, or a fraction of the depth below 1; write {value:.0f} for blocks")
        return value

    @property
    def serving(self) -> Serving:
        """How the server's half learns from several clients: from all at once, one after the other, or in a copy for each."""
        return "concatenated"

    @property
    def period(self) -> int | None:
        """Rounds between two aggregations of the clients' halves; None: they are never aggregated, and stay with the clients."""
        return 1

    @property
    def traits(self) -> Traits:
        """A shared server's half sees all clients of a round. Halves that are not aggregated in each round are private."""
        return Traits(coupled=self.serving != "per_client", private=self.period != 1)


class SplitMethod(Method):
    """Both halves run where the client runs; what crosses the cut is a real tensor, and it is charged."""

    Round: ClassVar[type[SplitRound]] = SplitRound
    """The work of a cohort."""

    @property
    def num_client_blocks(self) -> int:
        """Blocks on the client."""
        return num_blocks(self.config.split_point, self.context.num_layers)

    def check(self) -> None:
        """Raises UserError unless client and server both have a block."""
        depth, on_client = self.context.num_layers, self.num_client_blocks
        if not 1 <= on_client < depth:
            side = "client" if on_client < 1 else "server"
            what = (
                "it" if isinstance(self.config.split_point, int) else f"of {depth} blocks this is {on_client}, and it"
            )
            raise UserError(
                f"lies outside the model: {what} must be from 1 to {depth - 1}",
                field="method.split_point",
                value=self.config.split_point,
                hint=f"leave at least one block to the {side}",
            )

    def on_client(self, name: str) -> bool:
        """True if an adapter tensor belongs to the client's blocks."""
        return int(name.split(".")[1]) < self.num_client_blocks

    # -- what methods of the family override ----------------------------------------------------------------------------
    def paths(self, examples: np.ndarray) -> list[Path]:
        """The batches of a step that cross the cut, of n clients' ``examples (n, b)``. Default: these, and both halves learn."""
        return [Path(examples)]

    def loss(self, network: Network, hidden: Sequence[Tensor], batches: Sequence[Batch], num_clients: int) -> Tensor:
        """Each client's loss, (n,), from the hidden states (n b, S, D) after the last block of every path.

        Those of a path that teaches nobody carry no gradient. ``batches`` has the paths' labels and the examples' rows.
        """
        return cohort_loss(network, hidden[0], batches[0].labels, num_clients)[0]

    def serving_order(self, tasks: Sequence[ClientTask]) -> list[int]:
        """The order in which an ``in_turn`` server serves n clients in a step, as places in ``tasks``. Default: as they are."""
        return list(range(len(tasks)))

    # -- server ---------------------------------------------------------------------------------------------------------
    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The clients' half goes down; the server's half goes along outside of the link.

        Where clients keep their halves for several rounds, the common half is sent to a client once in each period.
        """
        client = {n: t for n, t in state.tensors.items() if n.startswith("layers.") and self.on_client(n)}
        server = {n: t for n, t in state.tensors.items() if n not in client}
        values = {"num_server_steps": state.values.get("num_server_steps", 0)}
        period = self.config.period
        if period == 1:
            return Payload(client, values, server)
        number = state.values.get(PERIOD, 0)
        is_last = period is not None and (round_idx + 1) % period == 0
        provision = Provision(f"client half {number}", partial(_the_half, client))
        return Payload({}, {**values, PERIOD: number, "is_last": is_last}, {**client, **server}, provision=provision)

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """Average the clients' halves, if they came; the server's half is what it became, or the average of its copies."""
        total: Tensors = {}
        server: Tensors = {}
        for update in updates:
            add_weighted(total, update.tensors, update.weight)
            add_weighted(server, update.server, update.weight)
        values = dict(state.values)
        if "server.num_steps" in server:
            values["num_server_steps"] = int(server.pop("server.num_steps"))
        if total and self.config.period != 1:
            values[PERIOD] = values.get(PERIOD, 0) + 1
        return State({**state.tensors, **total, **server}, values)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel | Mapping[str, GlobalModel]:
        """Both halves together."""
        return self.common_model(state, private)

    def common_model(self, state: State, private: PrivateStates) -> GlobalModel:
        """The server's half with the clients' common one; the server's moments are no part of the model.

        Between two aggregations the client's half is the average of those that were trained since, by numbers of examples.
        """
        adapter = select(state.tensors, lambda name: name.startswith("layers."))
        if self.config.period != 1:
            adapter.update(self.mean_half(state, private))
        return GlobalModel(self.context.whole_model, adapter)

    def mean_half(self, state: State, private: PrivateStates) -> Tensors:
        """The average of the client halves of the current period; {} if there are none."""
        number = state.values.get(PERIOD, 0)
        halves = [(n, half) for _, n, half in private() if int(half[PERIOD]) == number]
        total = sum(n for n, _ in halves)
        mean = weighted_sum((n / total, half) for n, half in halves)
        mean.pop(PERIOD, None)
        return mean

    def personal(
        self, state: State, client: ClientInfo, private: Tensors, models: Mapping[str, GlobalModel]
    ) -> GlobalModel:
        """The server's half with the client's own, where it keeps one, or else with the common one from which it starts next."""
        if self.config.period == 1:
            return super().personal(state, client, private, models)
        adapter = select(state.tensors, lambda name: name.startswith("layers."))
        if private and int(private[PERIOD]) == state.values.get(PERIOD, 0):
            adapter.update(select(private, lambda name: name != PERIOD))
        return GlobalModel(self.context.whole_model, adapter)

    def columns(self, state: State) -> dict[str, float]:
        """Where the model is cut."""
        return {"split_point": float(self.num_client_blocks)}

    # -- client ---------------------------------------------------------------------------------------------------------
    def local_plan(self, payload: Payload) -> LocalPlan:
        """The client trains the adapters of its own blocks; it sends them, or keeps them until the period ends."""
        keeps = self.config.period != 1
        return LocalPlan(
            self.model(payload),
            trainable=self.on_client,
            uploads=self.on_client if not keeps or payload.values["is_last"] else none,
            keeps=self.on_client if keeps else none,
            split=self.num_client_blocks,
            pipelined=self.config.pipelined,
        )

    def client_adapter(self, payload: Payload) -> Tensors:
        """The client's half as the server has it."""
        if self.config.period == 1:
            return payload.tensors
        return select(payload.server, lambda name: name.startswith("layers.") and self.on_client(name))

    def client_start(self, payload: Payload, task: ClientTask) -> Tensors:
        """The half from which a client starts: its own of this period, or else the common one."""
        start, own = self.client_adapter(payload), task.private
        if own is None or int(own[PERIOD]) != payload.values[PERIOD]:
            return start
        return {name: own[name] for name in start}

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """All steps of all clients of the cohort; both halves, cut by detached tensors."""
        return self.Round(self, worker, payload, tasks).run()


def drawn_order(run_seed: int, round_idx: int, client_ids: Sequence[int]) -> list[int]:
    """Places in ``client_ids`` in an order that is drawn for the round, and is the same however they are arranged."""
    draws = [(seed_of(run_seed, "split/order", round_idx, client), place) for place, client in enumerate(client_ids)]
    return [place for _, place in sorted(draws)]


def _the_half(half: Tensors, last: str | None) -> Sequence[Tensors]:
    """What a client lacks of a period's common half, whatever it was sent last: all of it."""
    return [half]
