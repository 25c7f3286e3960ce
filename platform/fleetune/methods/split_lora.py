"""SplitLoRA: the model is cut; the client holds the first blocks, the server the rest, and activations cross the cut.

Lin et al. 2024, "SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework for Large Language Models", arXiv 2407.00952.
The server's three variants follow Thapa et al. 2022, "SplitFed", arXiv 2004.12088, and the text of LESFT (CMC 2026).

        client k                                  server
        embed, blocks [0, c) with Theta_k  ──S_k──►  blocks [c, L) with Phi, norm, head, loss
                 ▲                        ◄─dL/dS_k──            │
              step Theta_k                                    step Phi

At the round's end the client adapters are averaged, Theta = sum_k p_k Theta_k. The server's adapter Phi is shared by all
clients and updated once per step from the concatenation of their activations (``concatenated``), or after each client's
mini-batch in turn (``in_turn``, what the authors' code does), or there is one copy per client, averaged each round
(``per_client``, SplitFed-V1). Its AdamW moments live as long as the run; the clients' start anew each round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fleetune.data.batches import NO_EXAMPLE
from fleetune.errors import UserError
from fleetune.methods.base import GlobalModel, Method, MethodConfig, Payload, PrivateStates, State, Update
from fleetune.methods.traits import Traits
from fleetune.models.network import Network
from fleetune.scopes import on_server
from fleetune.tensors import Stack, Tensors, add_weighted, select
from fleetune.training.config import LocalConfig
from fleetune.training.loss import cohort_loss
from fleetune.training.optimizer import Optimizer, clip_rows, make_optimizer, moments, restore_moments
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.trainer import (
    StackedAdapters,
    begin_training,
    collate_step,
    end_training,
    row_lengths,
    step_rows,
)
from fleetune.training.worker import Worker


class SplitLoRAConfig(MethodConfig):
    """Settings of SplitLoRA."""

    counts_blocks: ClassVar[tuple[str, ...]] = ("split_point",)

    name: Literal["split-lora"] = "split-lora"
    split_point: int = Field(4, ge=1, le=10_000)
    """Blocks on the client; the cut is after them. The paper takes a quarter of the model."""
    server: Literal["concatenated", "in_turn", "per_client"] = "concatenated"
    """How the server's half learns from several clients."""
    pipelined: bool = False
    """Client, links and server work on different micro-batches of a step at once, instead of one after the other. Gradients
    are summed, so the result is the same; the steps take as long as the slowest of them."""

    @property
    def traits(self) -> Traits:
        """A shared server's half sees all clients of a round."""
        return Traits(coupled=self.server != "per_client")


class SplitLoRA(Method):
    """Both halves run where the client runs; what crosses the cut is a real tensor, and it is charged."""

    Config = SplitLoRAConfig
    source: ClassVar[str] = "cut the model between client and server (Lin et al. 2024, arXiv 2407.00952)"

    def check(self) -> None:
        """Raises UserError unless client and server both have a block."""
        if not self.config.split_point < self.context.num_layers:
            raise UserError(
                f"lies outside the model: it must be from 1 to {self.context.num_layers - 1}",
                field="method.split_point",
                value=self.config.split_point,
                hint="leave at least one block to the server",
            )

    def on_client(self, name: str) -> bool:
        """True if an adapter tensor belongs to the client's blocks."""
        return int(name.split(".")[1]) < self.config.split_point

    def local_plan(self, payload: Payload) -> LocalPlan:
        """The client trains and uploads the adapters of its own blocks."""
        return LocalPlan(
            self.model(payload),
            trainable=self.on_client,
            uploads=self.on_client,
            split=self.config.split_point,
            pipelined=self.config.pipelined,
        )

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The clients' half goes down; the server's half goes along outside of the link."""
        client = {n: t for n, t in state.tensors.items() if n.startswith("layers.") and self.on_client(n)}
        server = {n: t for n, t in state.tensors.items() if n not in client}
        return Payload(client, {"num_server_steps": state.values.get("num_server_steps", 0)}, server)

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """Average the clients' halves; the server's half is what it became, or the average of its copies."""
        total: Tensors = {}
        server: Tensors = {}
        for update in updates:
            add_weighted(total, update.tensors, update.weight)
            add_weighted(server, update.server, update.weight)
        values = dict(state.values)
        if "server.num_steps" in server:
            values["num_server_steps"] = int(server.pop("server.num_steps"))
        return State({**state.tensors, **total, **server}, values)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """Both halves together; the server's moments are no part of the model."""
        adapter = select(state.tensors, lambda name: name.startswith("layers."))
        return GlobalModel(self.context.whole_model, adapter)

    def columns(self, state: State) -> dict[str, float]:
        """Where the model is cut."""
        return {"split_point": float(self.config.split_point)}

    # -- the round's work -----------------------------------------------------------------------------------------------
    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """All steps of all clients of the cohort; both halves, cut by detached tensors."""
        plan = self.local_plan(payload)
        network = worker.network(plan.model)
        run = _SplitRound(self.config, network, plan, payload, tasks, worker.local)
        begin_training(network, run.ranked, worker.local)
        for step in range(max(len(task.rows) for task in tasks)):
            run.step(step, worker)
        end_training(network)
        return run.result()


class _SplitRound:
    """The two halves of one cohort of K clients while a round lasts.

    Clients are stacked in the order of their number of steps, the longest first. So those still at work are always the first n
    rows of every stack, and a client leaves it by n growing smaller; `result` puts them back into the order of their tasks.
    """

    def __init__(
        self,
        config: SplitLoRAConfig,
        network: Network,
        plan: LocalPlan,
        payload: Payload,
        tasks: Sequence[ClientTask],
        local: LocalConfig,
    ):
        self.config, self.network, self.plan, self.local, self.tasks = config, network, plan, local, tasks
        self.order = sorted(range(len(tasks)), key=lambda i: -len(tasks[i].rows))
        self.ranked = [tasks[i] for i in self.order]
        rates = torch.tensor([[task.learning_rate] for task in self.ranked]).to(network.device)
        self.clients = StackedAdapters([payload.tensors] * len(tasks), plan, network.device)
        self.client_optimizer = make_optimizer(local, self.clients.trained.data, rates)
        with on_server():
            self._set_up_server(config, payload, rates)
        self.losses, self.num_tokens = np.zeros(len(tasks)), np.zeros(len(tasks), np.int64)
        self.cut_bytes = np.zeros((2, len(tasks)), np.int64)
        # When each client's loss was first not finite, (K,), counted in calls of the server's half (`CohortUpdate.diverged_at`).
        self.diverged_at, self.num_served = np.full(len(tasks), np.inf), 0

    def _set_up_server(self, config: SplitLoRAConfig, payload: Payload, rates: Tensor) -> None:
        copies = len(rates) if config.server == "per_client" else 1
        server = {n: t for n, t in payload.server.items() if n.startswith("layers.")}
        self.server = StackedAdapters([server] * copies, LocalPlan(self.plan.model), self.network.device)
        self.server_optimizer = make_optimizer(self.local, self.server.trained.data, rates[:copies])
        if config.server != "per_client":
            restore_moments(
                self.server_optimizer, payload.server, payload.values["num_server_steps"], self.server.trained
            )

    def step(self, step: int, worker: Worker) -> None:
        """Client forward, cut, server forward, backward and step, cut, client backward and step."""
        active = [task for task in self.ranked if len(task.rows) > step]
        n = len(active)
        ids, labels = collate_step(worker.data, active, step, self.network.device)
        client = self.clients.parameters(n)
        self.network.set_adapter(client)
        activations = self.network.blocks(self.network.embed(ids), 0, self.plan.split)
        # S (n * batch, tokens, hidden): all that the server sees of the clients.
        smashed = activations.detach().requires_grad_()
        with on_server():
            self._serve(smashed, labels, n)
        assert smashed.grad is not None
        self.network.set_adapter(client)  # the server's step has set its own, and checkpointed blocks run again with it
        activations.backward(smashed.grad)
        self._update(self.clients, client, self.client_optimizer, n)
        self._charge(active, smashed, labels, smashed.grad, worker, step)

    def _serve(self, smashed: Tensor, labels: Tensor, n: int) -> None:
        """The server's half: one update from all n clients, one after each client, or one in every client's copy.

        Leaves dL/dS of each client's own loss in ``smashed.grad``. ``labels``: (n * batch, tokens).
        """
        if self.config.server == "in_turn":
            batch = len(smashed) // n
            smashed.grad = torch.empty_like(smashed)
            for k in range(n):
                rows = slice(k * batch, (k + 1) * batch)
                part = smashed[rows].detach().requires_grad_()
                self._note(slice(k, k + 1), self._serve_batch(part, labels[rows], 1, copies=1))
                assert part.grad is not None
                smashed.grad[rows] = part.grad
            return
        copies = n if self.config.server == "per_client" else 1
        self._note(slice(n), self._serve_batch(smashed, labels, n, copies=copies))

    def _note(self, clients: slice, losses: np.ndarray) -> None:
        """Add up the losses of a call of the server's half, and note whose were not finite in it for the first time."""
        self.losses[clients] += losses
        self.diverged_at[clients][~np.isfinite(losses) & np.isinf(self.diverged_at[clients])] = self.num_served
        self.num_served += 1

    def _serve_batch(self, smashed: Tensor, labels: Tensor, n: int, *, copies: int) -> np.ndarray:
        """Forward and backward of the server's blocks on the activations of n clients, and the server's step."""
        server = self.server.parameters(copies)
        self.network.set_adapter(server)
        h = self.network.blocks(smashed, self.config.split_point)
        loss, _ = cohort_loss(self.network, h, labels, n)
        # A shared half follows the mean over the n clients, copies follow each their own client's loss. A client's half has to
        # follow its own loss in either case: the mean's gradient with respect to S is 1 / n of that, which is undone here.
        (loss.sum() if copies == n else loss.mean()).backward()
        if copies != n:
            assert smashed.grad is not None
            smashed.grad.mul_(n)
        self._update(self.server, server, self.server_optimizer, copies)
        return np.array(loss.tolist())

    def _update(
        self,
        adapters: StackedAdapters,
        leaves: Tensors,
        optimizer: Optimizer,
        num_active: int,
    ) -> None:
        grads = adapters.gather_gradients(leaves, num_active)
        if self.local.max_grad_norm is not None:
            clip_rows(grads, self.local.max_grad_norm)
        optimizer.step(grads)

    def _charge(
        self,
        active: list[ClientTask],
        smashed: Tensor,
        labels: Tensor,
        grad: Tensor,
        worker: Worker,
        step: int,
    ) -> None:
        """Each client pays for its own batch, padded to its own longest example: activations and labels up, dL/dS down."""
        batch = len(smashed) // len(active)
        for k, examples in enumerate(step_rows(active, step)):
            examples = examples[examples != NO_EXAMPLE]
            rows = slice(k * batch, k * batch + len(examples))  # without those that fill up a short batch
            lengths = row_lengths(worker.data, examples)
            tokens = int(lengths.max())
            up = smashed[rows, :tokens].nbytes + labels[rows, :tokens].to(torch.int32).nbytes
            self.cut_bytes[:, k] += (up, grad[rows, :tokens].nbytes)
            self.num_tokens[k] += int(lengths.sum())

    def result(self) -> CohortUpdate:
        """The cohort's update in the order of its tasks."""
        back = np.argsort(self.order)
        steps = np.array([max(1, len(task.rows)) for task in self.ranked])
        upload = self.clients.trained.to("cpu")
        upload = Stack(upload.shapes, upload.data[torch.from_numpy(back)])
        if self.config.server == "per_client":
            weights = [task.weight for task in self.ranked]
            server = self.server.trained.to("cpu").weighted_sum(weights)
        else:
            server = self.server.trained.to("cpu").client(0)
            server.update(moments(self.server_optimizer, self.server.trained))
        return CohortUpdate(
            upload=upload,
            server=server,
            losses=(self.losses / steps)[back],
            num_tokens=self.num_tokens[back],
            cut_bytes=self.cut_bytes[:, back],
            diverged_at=self.diverged_at[back],
        )
