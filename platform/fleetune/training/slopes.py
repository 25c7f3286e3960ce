"""Slopes of the loss along random directions, for a cohort of K clients stacked, by forward passes alone.

        j = (L(theta + h v) - L(theta - h v)) / (2 h),   v ~ N(0, I)

theta is one for all clients and stays as it is; every client has its own examples and its own directions. A direction has an
address, (client's seed of the round, step, number), so whoever knows it can draw v again, and j v is sent as the one number j.

Shape legend: K clients, d numbers in the adapter, N directions per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fleetune.models.network import Network
from fleetune.scopes import ADAPTERS, part
from fleetune.seeds import seed_of
from fleetune.tensors import Stack, Tensors
from fleetune.training.loss import cohort_loss
from fleetune.training.plan import ClientTask
from fleetune.training.trainer import collate_step, row_lengths, step_rows

if TYPE_CHECKING:
    from fleetune.data.dataset import TokenizedDataset


@dataclass
class Slopes:
    """What K clients measured. Rows of clients with fewer steps than others are filled up with zeros."""

    slopes: np.ndarray
    """(K, steps, N) float32: j."""
    numbers: np.ndarray
    """(K, steps, N) float32: which of the step's directions each slope is along."""
    losses: np.ndarray
    """(K,) float: mean of both losses over all steps and directions, in nats per token."""
    num_tokens: np.ndarray
    """(K,) int: tokens of the client's batches, counted once however often they were run through the model."""


def draw(row: Tensor, task: ClientTask, step: int, number: int) -> None:
    """Fill ``row (d,)`` with a direction. It lies on the CPU, so that v is the same whatever device the model is on."""
    row.normal_(generator=torch.Generator().manual_seed(seed_of(task.seed, "direction", step, number)))


@torch.no_grad()
def measure_slopes(
    network: Network,
    adapter: Tensors,
    tasks: Sequence[ClientTask],
    *,
    data: TokenizedDataset,
    num_directions: int,
    h: float,
    candidates: int = 1,
    towards: Tensor | None = None,
) -> Slopes:
    """Measure along ``num_directions`` directions at every step; ``adapter`` is theta, {name: shape of one client}.

    With ``towards (d,)`` there are ``candidates`` for each of them, and those with the largest cosine with it are taken.
    """
    with part(ADAPTERS):
        theta = Stack.of([adapter]).to(network.device)  # data (1, d)
        moved = torch.empty(len(tasks), theta.data.shape[1])  # (K, d): the only further piece of theta's size
    num_steps = max(len(task.rows) for task in tasks)
    shape = (len(tasks), num_steps, num_directions)
    out = Slopes(
        np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(len(tasks)), np.zeros(len(tasks), np.int64)
    )
    for step in range(num_steps):
        at_work = [k for k, task in enumerate(tasks) if len(task.rows) > step]
        active = [tasks[k] for k in at_work]
        ids, labels = collate_step(data, active, step, network.device)
        out.num_tokens[at_work] += row_lengths(data, step_rows(active, step)).sum(axis=1)
        for k, task in zip(at_work, active, strict=True):
            out.numbers[k, step] = _chosen(moved[0], towards, task, step, num_directions, candidates)
        for n in range(num_directions):
            for row, k in zip(moved, at_work, strict=False):
                draw(row, tasks[k], step, int(out.numbers[k, step, n]))
            point = moved[: len(active)].to(network.device).mul_(h).add_(theta.data)  # theta + h v
            above = _losses(network, theta.views(point), ids, labels)
            # 2 theta - (theta + h v) is theta - h v: so no device keeps v beside the adapter that it runs with.
            below = _losses(network, theta.views(point.neg_().add_(theta.data, alpha=2.0)), ids, labels)
            out.slopes[at_work, step, n] = (above - below) / (2 * h)
            out.losses[at_work] += (above + below) / 2
    network.set_adapter(None)
    out.losses /= [max(1, len(task.rows) * num_directions) for task in tasks]
    return out


def _chosen(
    scratch: Tensor, towards: Tensor | None, task: ClientTask, step: int, num_directions: int, candidates: int
) -> list[int]:
    """The numbers of the step's directions that are measured, ascending. ``scratch`` is (d,) and is written over."""
    if towards is None:
        return list(range(num_directions))
    cosines = []
    for number in range(num_directions * candidates):
        draw(scratch, task, step, number)
        # The length of ``towards`` is the same for all and divides none. A client at a time: its choice is its own to the bit.
        cosines.append((torch.dot(scratch, towards) / torch.linalg.vector_norm(scratch)).tolist())
    return sorted(np.argsort(-np.array(cosines), kind="stable")[:num_directions].tolist())


def _losses(network: Network, adapters: Tensors, ids: Tensor, labels: Tensor) -> np.ndarray:
    """Each client's loss (K,) with its own adapter, {name: (K, …)}, on its own examples (K b, S)."""
    network.set_adapter(adapters)
    num_clients = len(next(iter(adapters.values())))
    loss, _ = cohort_loss(network, network.blocks(network.embed(ids)), labels, num_clients)
    return np.array(loss.tolist())


def slopes_and_directions(
    task: ClientTask, slopes: Tensor, numbers: Tensor | None, size: int
) -> Iterator[tuple[float, Tensor]]:
    """Every j that a client measured with its v (d,), d = ``size``, drawn again: in one tensor, which the next one writes over.

    ``slopes`` and ``numbers`` are (steps, N), with more rows than the client has steps if others have more; without ``numbers``
    the directions of a step are 0 to N - 1.
    """
    direction = torch.empty(size)
    for step, n in np.ndindex(len(task.rows), slopes.shape[1]):
        draw(direction, task, step, n if numbers is None else int(numbers[step, n]))
        yield float(slopes[step, n]), direction
