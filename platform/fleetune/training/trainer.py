"""The shared trainer: carries out a local plan for a cohort of K clients stacked; one client is a cohort of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fleetune.models.network import Network
from fleetune.scopes import ADAPTERS, SIMULATION, part
from fleetune.tensors import Stack, Tensors, select
from fleetune.training.config import LocalConfig
from fleetune.training.device import on_device
from fleetune.training.loss import cohort_loss
from fleetune.training.optimizer import MakeOptimizer, clip_rows, make_optimizer
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan

if TYPE_CHECKING:
    from fleetune.data.tokenize import TokenizedDataset


class StackedAdapters:
    """The adapters of K clients: the trained tensors in one buffer, their gradients in another, and the frozen tensors.

    Rows are ordered by falling number of steps, so that the clients that still train are always the first rows.
    """

    trained: Stack
    """data (K, P): P trained parameters of each client; the optimizer changes it in place."""
    frozen: Stack
    """data (K, Q): the adapter tensors that the plan does not train."""
    grads: Tensor
    """(K, P): gradients of ``trained.data``."""

    def __init__(self, starts: Sequence[Tensors], plan: LocalPlan, device: torch.device):
        """``starts``: the adapter that each of the K clients begins with, {name: shape of one client}."""
        with part(ADAPTERS):
            self.trained = Stack.of([select(start, plan.trainable) for start in starts]).to(device)
            self.frozen = Stack.of([select(start, lambda name: not plan.trainable(name)) for start in starts]).to(
                device
            )
        # No device is charged for this second buffer of gradients: its optimizer reads those of the leaves themselves.
        with part(SIMULATION):
            self.grads = torch.zeros_like(self.trained.data)

    def parameters(self, num_active: int) -> Tensors:
        """Leaves {name: (num_active, …)}: views of the first clients' rows, which the optimizer changes in place."""
        views = self.trained.views(self.trained.data[:num_active])
        return {name: view.detach().requires_grad_() for name, view in views.items()}

    def gather_gradients(self, leaves: Tensors, num_active: int) -> Tensor:
        """The leaves' gradients in one buffer (num_active, P); a leaf that the loss does not reach counts as zero."""
        out = self.grads[:num_active]
        with part(SIMULATION):
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves.values()]
            return torch.cat([grad.view(num_active, -1) for grad in grads], dim=1, out=out)

    def all_tensors(self, leaves: Tensors, num_active: int) -> Tensors:
        """Trained leaves and frozen tensors together, {name: (num_active, …)}, as the network takes them."""
        return {**leaves, **self.frozen.views(self.frozen.data[:num_active])}

    def merged(self) -> Stack:
        """Trained and frozen tensors in one stack (K, P + Q), as they are now."""
        if not self.frozen.shapes:
            return self.trained
        data = torch.cat([self.trained.data, self.frozen.data], dim=1)
        return Stack({**self.trained.shapes, **self.frozen.shapes}, data)


def train_cohort(
    network: Network,
    plan: LocalPlan,
    start: Tensors,
    tasks: Sequence[ClientTask],
    *,
    data: TokenizedDataset,
    local: LocalConfig,
    make: MakeOptimizer = make_optimizer,
) -> CohortUpdate:
    """Train every client of the cohort from ``start``, {name: shape of one client}, overlaid with its own private tensors.

    ``make`` makes the optimizer, by default a fresh one for the round.

    Inside the stack the clients with more steps come first. Those that are done are always its last rows and are left out of
    the next step, so that no work is spent on them. Results are in the order of ``tasks``.
    """
    order = sorted(range(len(tasks)), key=lambda i: -len(tasks[i].rows))
    ranked = [tasks[i] for i in order]
    adapters = StackedAdapters([_start_of(task, start, plan, data) for task in ranked], plan, network.device)
    compute_loss = plan.loss or cohort_loss
    rates = torch.tensor([[task.learning_rate] for task in ranked]).to(network.device)
    optimizer = make(local, adapters.trained.data, rates)
    initial = Stack(adapters.trained.shapes, adapters.trained.data.clone()) if plan.penalty else None
    losses = np.zeros(len(tasks))  # (K,) sums over steps, in the stack's order
    num_tokens = np.zeros(len(tasks), np.int64)  # (K,)

    begin_training(network, ranked, local)
    for step in range(len(ranked[0].rows) if ranked else 0):
        active = [task for task in ranked if len(task.rows) > step]
        n = len(active)
        # New leaves each step, so that no gradient is left from the last one and the rows of finished clients are gone.
        leaves = adapters.parameters(n)
        network.set_adapter(adapters.all_tensors(leaves, n))
        ids, labels = collate_step(data, active, step, network.device)
        loss, _ = compute_loss(network, network.blocks(network.embed(ids)), labels, n)
        total = loss
        if plan.penalty and initial:
            total = loss + plan.penalty(leaves, initial.views(initial.data[:n]))
        total.sum().backward()  # a client's loss depends on its own rows alone: the gradient of the sum is each one's own
        grads = adapters.gather_gradients(leaves, n)
        if plan.after_backward is not None:
            with torch.no_grad():
                frozen = adapters.frozen.views(adapters.frozen.data[:n])
                plan.after_backward(leaves, adapters.trained.views(grads), frozen, step)
        if local.max_grad_norm is not None:
            clip_rows(grads, local.max_grad_norm)
        optimizer.step(grads)
        losses[:n] += loss.tolist()
        num_tokens[:n] += row_lengths(data, step_rows(active, step)).sum(axis=1)
    end_training(network)
    return _in_task_order(adapters.merged(), plan, ranked, order, losses, num_tokens)


def _start_of(task: ClientTask, start: Tensors, plan: LocalPlan, data: TokenizedDataset) -> Tensors:
    """The adapter that a client starts from: the common one, what it kept from its last round, and what it makes itself."""
    own = plan.per_client(task, data) if plan.per_client is not None else {}
    return {**start, **(task.private or {}), **own}


def begin_training(network: Network, tasks: Sequence[ClientTask], local: LocalConfig) -> None:
    """Switch on checkpointing if the job file says so, and dropout if the adapter has any.

    Dropout draws from the first client's seed. Clients with dropout train one by one, so the first is the only one.
    """
    network.checkpointing = local.checkpointing
    uses_dropout = bool(tasks) and any(site.dropout for site in network.sites.values())
    network.model.train(uses_dropout)
    if uses_dropout:
        torch.manual_seed(tasks[0].seed)


def end_training(network: Network) -> None:
    """Leave the scratch network without adapters, dropout and checkpointing, as `begin_training` found it."""
    network.checkpointing = False
    network.set_adapter(None)
    network.model.eval()


def row_lengths(data: TokenizedDataset, rows: np.ndarray) -> np.ndarray:
    """Tokens of each example, of the shape of ``rows``; 0 for the entries that fill up a batch."""
    from fleetune.data.batches import num_tokens

    return num_tokens(data, rows)


def step_rows(tasks: Sequence[ClientTask], step: int) -> np.ndarray:
    """Examples of one step of all clients, (K, b), b the largest batch among them; smaller ones are filled up with NO_EXAMPLE."""
    from fleetune.data.batches import NO_EXAMPLE

    rows = np.stack([np.asarray(task.rows[step]) for task in tasks])
    return rows[:, : int((rows != NO_EXAMPLE).sum(axis=1).max())]


def collate_step(
    data: TokenizedDataset, tasks: Sequence[ClientTask], step: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, (K b, S) each, of one step of all clients, padded on the right to the longest example."""
    from fleetune.data.batches import collate

    ids, labels = collate(data, step_rows(tasks, step).reshape(-1))
    return on_device(ids, device), on_device(labels, device)


def _in_task_order(
    merged: Stack,
    plan: LocalPlan,
    ranked: list[ClientTask],
    order: list[int],
    losses: np.ndarray,
    num_tokens: np.ndarray,
) -> CohortUpdate:
    """The cohort's update from stack, losses and tokens (K,) in the stack's order, brought back into the order of the tasks."""
    back = np.argsort(order)  # the inverse permutation: row of the stack for each task
    merged = merged.to("cpu")
    merged = Stack(merged.shapes, merged.data[torch.from_numpy(back)] if len(order) > 1 else merged.data)
    steps = np.array([max(1, len(task.rows)) for task in ranked])
    private = merged.columns(plan.keeps)
    return CohortUpdate(
        upload=merged.columns(plan.uploads),
        private=private if private.shapes else None,
        losses=(losses / steps)[back],
        num_tokens=num_tokens[back],
    )
