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
from fleetune.training.optimizer import clip_rows, make_optimizer
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan

if TYPE_CHECKING:
    from fleetune.data.tokenize import TokenizedDataset


class StackedAdapters:
    """The adapters of K clients: a trained part in one buffer beside that of its gradient, and a frozen part."""

    def __init__(self, starts: Sequence[Tensors], plan: LocalPlan, device: torch.device):
        with part(ADAPTERS):
            self.trained = Stack.of([select(start, plan.trainable) for start in starts]).to(device)
            self.frozen = Stack.of([select(start, lambda name: not plan.trainable(name)) for start in starts]).to(
                device
            )
        with part(SIMULATION):  # a device's optimizer reads the leaves' own gradients: it holds one of each
            self.grads = torch.zeros_like(self.trained.data)

    def parameters(self, num_active: int) -> Tensors:
        """Leaves {name: (num_active, …)} over the buffer's rows of the first clients."""
        views = self.trained.views(self.trained.data[:num_active])
        return {name: view.detach().requires_grad_() for name, view in views.items()}

    def gather_gradients(self, leaves: Tensors, num_active: int) -> Tensor:
        """The leaves' gradients in one buffer (num_active, P); a leaf that the loss does not reach counts as zero."""
        out = self.grads[:num_active]
        with part(SIMULATION):
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves.values()]
            return torch.cat([grad.view(num_active, -1) for grad in grads], dim=1, out=out)

    def all_tensors(self, leaves: Tensors, num_active: int) -> Tensors:
        """Trained leaves and frozen tensors together, as the network takes them."""
        return {**leaves, **self.frozen.views(self.frozen.data[:num_active])}

    def merged(self) -> Stack:
        """Everything in one stack, as it stands now."""
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
) -> CohortUpdate:
    """Train every client of the cohort from ``start`` (its own private tensors laid over it).

    Clients with more steps come first inside the stack and the others leave it when they are done, so that no work is
    spent on them. Results are in the order of ``tasks``.
    """
    order = sorted(range(len(tasks)), key=lambda i: -len(tasks[i].rows))
    ranked = [tasks[i] for i in order]
    adapters = StackedAdapters([{**start, **(task.private or {})} for task in ranked], plan, network.device)
    rates = torch.tensor([[task.learning_rate] for task in ranked]).to(network.device)
    optimizer = make_optimizer(local, adapters.trained.data, rates)
    initial = Stack(adapters.trained.shapes, adapters.trained.data.clone()) if plan.penalty else None
    losses = np.zeros(len(tasks))
    num_tokens = np.zeros(len(tasks), np.int64)

    begin_training(network, ranked, local)
    for step in range(len(ranked[0].rows) if ranked else 0):
        active = [task for task in ranked if len(task.rows) > step]
        n = len(active)
        leaves = adapters.parameters(n)
        network.set_adapter(adapters.all_tensors(leaves, n))
        ids, labels = collate_step(data, active, step, network.device)
        loss, _ = cohort_loss(network, network.blocks(network.embed(ids)), labels, n)
        total = loss
        if plan.penalty and initial:
            total = loss + plan.penalty(leaves, initial.views(initial.data[:n]))
        total.sum().backward()
        grads = adapters.gather_gradients(leaves, n)
        if local.max_grad_norm is not None:
            clip_rows(grads, local.max_grad_norm)
        optimizer.step(grads)
        losses[:n] += loss.tolist()
        num_tokens[:n] += row_lengths(data, step_rows(active, step)).sum(axis=1)
    end_training(network)
    return _in_task_order(adapters.merged(), plan, ranked, order, losses, num_tokens)


def begin_training(network: Network, tasks: Sequence[ClientTask], local: LocalConfig) -> None:
    """Checkpointing as the job file says. Dropout on, where the adapter has any; it draws at the first client's address."""
    network.checkpointing = local.checkpointing
    uses_dropout = bool(tasks) and any(site.dropout for site in network.sites.values())
    network.model.train(uses_dropout)
    if uses_dropout:
        torch.manual_seed(tasks[0].seed)


def end_training(network: Network) -> None:
    """Leave the scratch network as it was found."""
    network.checkpointing = False
    network.set_adapter(None)
    network.model.eval()


def row_lengths(data: TokenizedDataset, rows: np.ndarray) -> np.ndarray:
    """Tokens of each example; none where a batch is filled up."""
    from fleetune.data.batches import num_tokens

    return num_tokens(data, rows)


def step_rows(tasks: Sequence[ClientTask], step: int) -> np.ndarray:
    """Examples of one step of all clients, (K, b): as wide as the largest batch of them, smaller ones filled up."""
    from fleetune.data.batches import NO_EXAMPLE

    rows = np.stack([np.asarray(task.rows[step]) for task in tasks])
    return rows[:, : int((rows != NO_EXAMPLE).sum(axis=1).max())]


def collate_step(
    data: TokenizedDataset, tasks: Sequence[ClientTask], step: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and labels (K b, S) of one step of all clients, padded on the right to the longest of them."""
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
    back = np.argsort(order)
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
