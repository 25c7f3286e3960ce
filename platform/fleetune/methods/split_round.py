"""The work of a round on a model that is cut: the two halves of a cohort, and what crosses between them.

A method of the family (`methods.split`) says what is particular to it: which batches cross (`SplitMethod.paths`), the loss
(`SplitMethod.loss`), the order in which the server serves clients (`SplitMethod.serving_order`). Shape legend: n clients at work,
b examples of each in a step, S tokens, D the hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fleetune.data.batches import NO_EXAMPLE, collate
from fleetune.models.network import Network
from fleetune.scopes import on_client, on_server
from fleetune.tensors import Stack, Tensors
from fleetune.training.config import LocalConfig
from fleetune.training.device import on_device
from fleetune.training.optimizer import Optimizer, clip_rows, make_optimizer, moments, restore_moments
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.trainer import StackedAdapters, begin_training, end_training, row_lengths, step_rows
from fleetune.training.wire import GRADIENT_SCALE, received, wire_bytes
from fleetune.training.worker import Worker

if TYPE_CHECKING:
    from fleetune.data.dataset import TokenizedDataset
    from fleetune.methods.base import Payload
    from fleetune.methods.split import SplitMethod

PERIOD = "period"
"""A client that keeps its half for several rounds notes in this private tensor, (1,), in which period it did so."""

Learns = Literal["both", "server", "neither"]


@dataclass(frozen=True)
class Path:
    """A batch of each of n clients that crosses the cut in a step. An example may take several paths."""

    examples: np.ndarray
    """(n, b) rows of the dataset, NO_EXAMPLE for those that fill up a batch."""
    learns: Learns = "both"
    """Which halves get gradients of it: with ``server`` no gradient comes down, with ``neither`` both only look ahead."""
    sends_labels: bool = True
    """True if its labels go up with it: 4 bytes per token."""
    on_reference: bool = False
    """True if these are the examples' reference paths (`data.references`)."""


@dataclass(frozen=True)
class Batch:
    """A path's tensors while it is worked on."""

    path: Path
    ids: Tensor
    """(n b, S) token ids."""
    labels: Tensor
    """(n b, S) token ids, -100 where nothing is predicted."""

    def of(self, k: int) -> Batch:
        """The batch of client k alone."""
        size = self.path.examples.shape[1]
        rows = slice(k * size, (k + 1) * size)
        path = replace(self.path, examples=self.path.examples[k : k + 1])
        return Batch(path, self.ids[rows], self.labels[rows])


class SplitRound:
    """The two halves of one cohort of K clients while a round lasts.

    Clients are stacked in the order of their number of steps, the longest first. So those still at work are always the first n
    rows of every stack, and a client leaves it by n growing smaller; `result` puts them back into the order of their tasks.
    """

    def __init__(self, method: SplitMethod, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]):
        self.method, self.config, self.worker, self.tasks = method, method.config, worker, tasks
        self.plan = method.local_plan(payload)
        self.local: LocalConfig = worker.local
        self.network: Network = worker.network(self.plan.model)
        self.payload, self.cut = payload, method.num_client_blocks
        self.order = sorted(range(len(tasks)), key=lambda i: -len(tasks[i].rows))
        self.ranked = [tasks[i] for i in self.order]
        rates = torch.tensor([[task.learning_rate] for task in self.ranked]).to(self.network.device)
        starts = [method.client_start(payload, task) for task in self.ranked]
        self.clients = StackedAdapters(starts, self.plan, self.network.device)
        self.client_optimizer = make_optimizer(self.local, self.clients.trained.data, rates)
        with on_server():
            self._set_up_server(payload, rates)
        self.losses, self.num_tokens = np.zeros(len(tasks)), np.zeros(len(tasks), np.int64)
        self.cut_bytes: dict[int, np.ndarray] = {}  # place of a path among those of a step -> (2, K) bytes up and down
        # When each client's loss was first not finite, (K,), counted in calls of the server's half (`CohortUpdate.diverged_at`).
        self.diverged_at, self.num_served = np.full(len(tasks), np.inf), 0

    def _set_up_server(self, payload: Payload, rates: Tensor) -> None:
        copies = len(rates) if self.config.serving == "per_client" else 1
        server = {n: t for n, t in payload.server.items() if n.startswith("layers.") and not self.method.on_client(n)}
        self.server = StackedAdapters([server] * copies, LocalPlan(self.plan.model), self.network.device)
        self.server_optimizer = make_optimizer(self.local, self.server.trained.data, rates[:copies])
        if self.config.serving != "per_client":
            restore_moments(
                self.server_optimizer, payload.server, payload.values["num_server_steps"], self.server.trained
            )

    def run(self) -> CohortUpdate:
        """All steps of all clients of the cohort."""
        begin_training(self.network, self.ranked, self.local)
        for step in range(max(len(task.rows) for task in self.tasks)):
            self.step(step)
        end_training(self.network)
        return self.result()

    def step(self, step: int) -> None:
        """Client forward, cut, server forward, backward and step, cut, client backward and step."""
        active = [task for task in self.ranked if len(task.rows) > step]
        n = len(active)
        batches = [self._collated(path) for path in self.method.paths(step_rows(active, step))]
        client = self.clients.parameters(n)
        self.network.set_adapter(client)
        activations = [self._client_forward(batch) for batch in batches]
        # S (n b, S, D) of each path: all that the server sees of the clients.
        smashed = [self._arrived(h, batch) for h, batch in zip(activations, batches, strict=True)]
        with on_server():
            self._serve(smashed, batches, n)
        returning = [(h, s) for h, s, batch in zip(activations, smashed, batches, strict=True) if _comes_back(batch)]
        if returning:
            self.network.set_adapter(
                client
            )  # the server's step has set its own, and checkpointed blocks run again with it
            grads = [self._returned(s) for _, s in returning]
            torch.autograd.backward([h for h, _ in returning], grads)
            self._update(self.clients, client, self.client_optimizer, n)
        for i, (smashed_, batch) in enumerate(zip(smashed, batches, strict=True)):
            self._charge(i, batch, smashed_)
        self.num_tokens[:n] += row_lengths(self._data(batches[0].path), batches[0].path.examples).sum(axis=1)

    def _data(self, path: Path) -> TokenizedDataset:
        """The tokens that a path's examples have on it."""
        if not path.on_reference:
            return self.worker.data
        assert self.worker.data.reference is not None, "the method's traits do not ask for references"
        return self.worker.data.reference

    # -- what crosses ---------------------------------------------------------------------------------------------------
    def _collated(self, path: Path) -> Batch:
        ids, labels = collate(self._data(path), path.examples.reshape(-1))
        return Batch(path, on_device(ids, self.network.device), on_device(labels, self.network.device))

    def _client_forward(self, batch: Batch) -> Tensor:
        """The client's half on a path. A path that teaches nobody is looked at without dropout."""
        with torch.set_grad_enabled(_comes_back(batch)), self._without_dropout(batch.path.learns == "neither"):
            return self.network.blocks(self.network.embed(batch.ids), 0, self.cut)

    @contextlib.contextmanager
    def _without_dropout(self, is_without: bool) -> Iterator[None]:
        """Inside, no adapter drops anything if ``is_without``."""
        is_training = self.network.model.training
        if is_without and is_training:
            self.network.model.eval()
        try:
            yield
        finally:
            if is_without and is_training:
                self.network.model.train()

    def _arrived(self, h: Tensor, batch: Batch) -> Tensor:
        """The activations as the server gets them: a leaf, if their gradient is to come back."""
        return received(h.detach(), self.config.cut_precision).requires_grad_(_comes_back(batch))

    def _returned(self, smashed: Tensor) -> Tensor:
        """dL/dS as the clients get it."""
        assert smashed.grad is not None
        return received(smashed.grad, self.config.cut_precision, scale=GRADIENT_SCALE)

    # -- the server -----------------------------------------------------------------------------------------------------
    def _serve(self, smashed: list[Tensor], batches: list[Batch], n: int) -> None:
        """The server's half: one update from all n clients, one after each client, or one in every client's copy.

        Leaves dL/dS of each client's own loss in ``smashed[i].grad``.
        """
        if self.config.serving == "in_turn":
            returning = [i for i, batch in enumerate(batches) if _comes_back(batch)]
            for i in returning:
                smashed[i].grad = torch.empty_like(smashed[i])
            for k in self.method.serving_order(self.ranked[:n]):
                self._serve_one(smashed, batches, k, returning)
            return
        copies = n if self.config.serving == "per_client" else 1
        self._note(slice(n), self._serve_batch(smashed, batches, n, copies=copies))

    def _serve_one(self, smashed: list[Tensor], batches: list[Batch], k: int, returning: list[int]) -> None:
        """Serve client k alone; its rows of ``smashed[i].grad`` are filled in for the paths i that are ``returning``."""
        own = [batch.of(k) for batch in batches]
        rows = [slice(k * len(batch.ids), (k + 1) * len(batch.ids)) for batch in own]
        parts = [s[r].detach().requires_grad_(s.requires_grad) for s, r in zip(smashed, rows, strict=True)]
        self._note(slice(k, k + 1), self._serve_batch(parts, own, 1, copies=1))
        for i in returning:
            into, grad = smashed[i].grad, parts[i].grad
            assert into is not None
            assert grad is not None
            into[rows[i]] = grad

    def _note(self, clients: slice, losses: np.ndarray) -> None:
        """Add up the losses of a call of the server's half, and note whose were not finite in it for the first time."""
        self.losses[clients] += losses
        self.diverged_at[clients][~np.isfinite(losses) & np.isinf(self.diverged_at[clients])] = self.num_served
        self.num_served += 1

    def _serve_batch(self, smashed: list[Tensor], batches: list[Batch], n: int, *, copies: int) -> np.ndarray:
        """Forward and backward of the server's blocks on the activations of n clients, and the server's step."""
        server = self.server.parameters(copies)
        self.network.set_adapter(server)
        hidden = [self._server_forward(s, batch) for s, batch in zip(smashed, batches, strict=True)]
        # A shared half follows the mean over the n clients, copies follow each their own client's loss. A client's half has to
        # follow its own loss in either case: the mean's gradient with respect to S is 1 / n of that, which is undone here.
        is_shared = copies != n
        if self.config.head == "client":
            losses = self._head_on_client(hidden, batches, n, is_shared=is_shared)
        else:
            losses = self.method.loss(self.network, hidden, batches, n)
            (losses.mean() if is_shared else losses.sum()).backward()
        if is_shared:
            for s in smashed:
                if s.grad is not None:
                    s.grad.mul_(n)
        self._update(self.server, server, self.server_optimizer, copies)
        return np.array(losses.tolist())

    def _server_forward(self, smashed: Tensor, batch: Batch) -> Tensor:
        """The server's blocks on a path. A path that teaches nobody is looked at without dropout."""
        learns = batch.path.learns != "neither"
        with torch.set_grad_enabled(learns), self._without_dropout(not learns):
            return self.network.blocks(smashed, self.cut)

    def _head_on_client(self, hidden: list[Tensor], batches: list[Batch], n: int, *, is_shared: bool) -> Tensor:
        """The second cut: hidden states come down, the client's norm, head and labels give the loss, and dL/dH goes up."""
        down = [received(h.detach(), self.config.cut_precision).requires_grad_(h.requires_grad) for h in hidden]
        with on_client():
            losses = self.method.loss(self.network, down, batches, n)
            losses.sum().backward()
        pairs = [(h, d.grad) for h, d in zip(hidden, down, strict=True) if d.grad is not None]
        grads = [received(g, self.config.cut_precision, scale=GRADIENT_SCALE) for _, g in pairs]
        torch.autograd.backward([h for h, _ in pairs], [g / n for g in grads] if is_shared else grads)
        return losses

    def _update(self, adapters: StackedAdapters, leaves: Tensors, optimizer: Optimizer, num_active: int) -> None:
        grads = adapters.gather_gradients(leaves, num_active)
        if self.local.max_grad_norm is not None:
            clip_rows(grads, self.local.max_grad_norm)
        optimizer.step(grads)

    # -- bytes and results ----------------------------------------------------------------------------------------------
    def _charge(self, i: int, batch: Batch, smashed: Tensor) -> None:
        """Each client pays for its own batch, padded to its own longest example, on the step's i-th path.

        Up: activations and labels; down: dL/dS if it learns. With the head on the client no labels go up, but hidden states
        come down, and their gradients go up.
        """
        precision, path, size = self.config.cut_precision, batch.path, batch.path.examples.shape[1]
        total = self.cut_bytes.setdefault(i, np.zeros((2, len(self.tasks)), np.int64))
        for k, examples in enumerate(path.examples):
            examples = examples[examples != NO_EXAMPLE]
            rows = slice(k * size, k * size + len(examples))  # without those that fill up a short batch
            tokens = int(row_lengths(self._data(path), examples).max())
            crossing = wire_bytes(smashed[rows, :tokens], precision)
            up, down = crossing, crossing if path.learns == "both" else 0
            if self.config.head == "client":
                up, down = up + (crossing if path.learns != "neither" else 0), down + crossing
            elif path.sends_labels:
                up += batch.labels[rows, :tokens].to(torch.int32).nbytes
            total[:, k] += (up, down)

    def result(self) -> CohortUpdate:
        """The cohort's update in the order of its tasks."""
        back = np.argsort(self.order)
        steps = np.array([max(1, len(task.rows)) for task in self.ranked])
        trained = self.clients.trained.to("cpu")
        trained = Stack(trained.shapes, trained.data[torch.from_numpy(back)])
        if self.config.serving == "per_client":
            weights = [task.weight for task in self.ranked]
            server = self.server.trained.to("cpu").weighted_sum(weights)
        else:
            server = self.server.trained.to("cpu").client(0)
            server.update(moments(self.server_optimizer, self.server.trained))
        upload = trained.columns(self.plan.uploads)
        cut_paths = [self.cut_bytes[i][:, back] for i in sorted(self.cut_bytes)]
        return CohortUpdate(
            upload=upload if upload.shapes else None,
            private=self._kept(trained),
            server=server,
            losses=(self.losses / steps)[back],
            num_tokens=self.num_tokens[back],
            cut_bytes=sum(cut_paths, np.zeros((2, len(back)), np.int64)),
            cut_paths=cut_paths,
            diverged_at=self.diverged_at[back],
        )

    def _kept(self, trained: Stack) -> Stack | None:
        """The halves that stay with their clients, each with the period in which it was trained; None if they stay not."""
        kept = trained.columns(self.plan.keeps)
        if not kept.shapes:
            return None
        period = kept.data.new_full((len(kept), 1), self.payload.values[PERIOD])
        return Stack({**kept.shapes, PERIOD: (1,)}, torch.cat([kept.data, period], dim=1))


def _comes_back(batch: Batch) -> bool:
    """True if a gradient of this path comes down to its clients."""
    return batch.path.learns == "both"
