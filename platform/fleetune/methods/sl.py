"""Split learning: one client half is handed on from client to client, and the server's half goes along with it.

Gupta and Raskar 2018, "Distributed learning of deep neural network over multiple agents", arXiv 1810.06060. With adapters in
place of whole halves, as LESFT compares it (CMC 2026): "no aggregation across clients is performed".

        Theta <- Theta_k,  Phi <- Phi_k        after client k has taken all of its steps; the next one starts from there

Clients take turns in an order that is drawn for each round, so that a round lasts as long as all of their turns together. With
``isolated``, the other reading of that sentence, every client keeps a half of its own and only the server's half goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import model_validator

from fleetune.methods.base import MAIN, GlobalModel, Payload, PrivateStates, State, Update
from fleetune.methods.split import SplitConfig, SplitMethod, drawn_order
from fleetune.methods.split_round import PERIOD
from fleetune.methods.traits import Traits
from fleetune.tensors import Tensors, all_finite
from fleetune.training.plan import ClientTask, CohortUpdate
from fleetune.training.worker import Worker


class SLConfig(SplitConfig):
    """Settings of split learning."""

    name: Literal["sl"] = "sl"
    isolated: bool = False
    """Every client keeps a half of its own, which nobody else gets; only the server's half is shared."""
    evaluates: Literal["average", "clients"] = "average"
    """With isolated halves: the quality of their average, or of each client's own model, whose mean is then the run's."""

    @model_validator(mode="after")
    def _only_isolated_halves_differ(self) -> SLConfig:
        if self.evaluates == "clients" and not self.isolated:
            raise ValueError(
                "evaluates: clients asks for a model of each client, but there is one half that is handed on; set "
                "isolated: true, or evaluates: average"
            )
        return self

    @property
    def period(self) -> int | None:
        """Nothing is aggregated: the half is handed on in each round, or stays."""
        return None if self.isolated else 1

    @property
    def traits(self) -> Traits:
        """Clients take turns. Of a half that is handed on the last client's counts, so that a sum says nothing."""
        return replace(super().traits, coupled=True, in_turn=True, partial_sums=self.isolated)


class SL(SplitMethod):
    """A chain of rounds of one client each."""

    Config = SLConfig
    source: ClassVar[str] = "hand one client half on from client to client (Gupta and Raskar 2018, arXiv 1810.06060)"

    def turns(self, client_ids: np.ndarray, round_idx: int) -> list[int]:
        """An order that is drawn for the round."""
        return drawn_order(self.context.seed, round_idx, client_ids.tolist())

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """The clients one after the other. Late ones come last, and what the server learnt from them does not count.

        Who hands on numbers that are not finite has diverged, and not the next client, whose loss they spoil.
        """
        updates: dict[int, CohortUpdate] = {}
        server: Tensors = {}
        last: CohortUpdate | None = None
        num_served = 0
        for place in self.turns(np.array([task.client_id for task in tasks]), tasks[0].address[1]):
            if last is not None:
                payload = self._handed_on(payload, last)
            last = self.Round(self, worker, payload, [tasks[place]]).run()
            assert last.diverged_at is not None
            diverged_at, num_served = last.diverged_at + num_served, num_served + len(tasks[place].rows)
            if len(tasks) > 1 and not _is_finite(last):
                diverged_at = np.minimum(
                    diverged_at, num_served - 0.5
                )  # after its last call, before the next client's first
            updates[place] = replace(last, server={}, diverged_at=diverged_at)
            if tasks[place].weight > 0:
                server = last.server
        return replace(CohortUpdate.joined([updates[place] for place in range(len(tasks))]), server=server)

    def _handed_on(self, payload: Payload, update: CohortUpdate) -> Payload:
        """The payload for the next client: both halves, or the server's alone, as the last client left them."""
        halves = {name: tensor for name, tensor in update.server.items() if name != "server.num_steps"}
        num_steps = update.server.get("server.num_steps", payload.values["num_server_steps"])
        tensors = payload.tensors if update.upload is None else update.upload.client(0)
        values = {**payload.values, "num_server_steps": int(num_steps)}
        return replace(payload, tensors=tensors, values=values, server={**payload.server, **halves})

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The client half of the last client in the chain, and the server's half as it became."""
        if self.config.isolated:
            return super().aggregate(state, updates, round_idx)
        server, halves = Update({}, 1.0, ()), {}
        for update in updates:
            server = replace(server, server=update.server) if update.server else server
            if update.tensors:
                halves[update.client_ids[0]] = update.tensors
        ids = list(halves)
        last = ids[self.turns(np.array(ids), round_idx)[-1]] if ids else None
        chosen = [] if last is None else [Update(halves[last], 1.0, (last,))]
        return super().aggregate(state, [server, *chosen], round_idx)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel | dict[str, GlobalModel]:
        """The model of both halves, with isolated ones that of their average; or the models of the clients that took part."""
        common = self.common_model(state, private)
        if self.config.evaluates == "average":
            return common
        models = {}
        for client, _, half in private():
            own = {name: tensor for name, tensor in half.items() if name != PERIOD}
            models[f"client-{client}"] = replace(common, adapter={**common.adapter, **own})
        return models or {MAIN: common}

    def deployed(self, state: State, private: PrivateStates) -> GlobalModel:
        """The common model, or that of the isolated halves' average."""
        return self.common_model(state, private)


def _is_finite(update: CohortUpdate) -> bool:
    """True if all that a client hands on or keeps is finite."""
    own = [stack.data for stack in (update.upload, update.private) if stack is not None]
    return all_finite([*own, *update.server.values()])
