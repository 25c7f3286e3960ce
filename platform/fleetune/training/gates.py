"""What a client learns of its gates while it trains: their mean over the tokens that count, and a loss that balances them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fleetune.data.batches import IGNORED
from fleetune.models.network import Network
from fleetune.tensors import Tensors
from fleetune.training.loss import cohort_loss
from fleetune.training.plan import AfterBackward, Loss


def mean_gates(gates: Tensor, labels: Tensor) -> Tensor:
    """Each client's mean gates (K, E) over the positions that predict a counted token: gates (K, b S, E), labels (K b, S).

    Other positions are left out, as how much a batch is padded depends on the clients that are worked on together.
    """
    counted = torch.zeros(labels.shape, dtype=gates.dtype, device=labels.device)
    counted[:, :-1] = labels[:, 1:] != IGNORED
    counted = counted.reshape(gates.shape[0], -1, 1)  # (K, b S, 1)
    return (gates * counted).sum(1) / counted.sum(1).clamp(min=1)


def balance(means: list[Tensor]) -> Tensor:
    """-sum_n log q_n (K,), q_n (K, N) the mean over all layers of ``means``, (K, N) each; least, N log N, if gates are equal."""
    return -torch.stack(means).mean(0).log().sum(-1)


def balanced(alpha: float) -> Loss:
    """A client's loss with alpha times the balance of its gates added to it."""

    def loss(network: Network, h: Tensor, labels: Tensor, num_clients: int) -> tuple[Tensor, Tensor]:
        task, counts = cohort_loss(network, h, labels, num_clients)
        if not alpha:
            return task, counts
        means = [mean_gates(gates, labels) for gates in network.gates().values()]
        return task + alpha * balance(means), counts

    return loss


def noting(loss: Loss | None) -> tuple[Loss, AfterBackward]:
    """The loss, and what writes down the mean gates of all steps so far: in each client's ``<site>.fusion`` (E,)."""
    noted: Tensors = {}
    compute: Callable[..., tuple[Tensor, Tensor]] = loss or cohort_loss

    def noted_loss(network: Network, h: Tensor, labels: Tensor, num_clients: int) -> tuple[Tensor, Tensor]:
        noted.clear()
        noted.update({site: mean_gates(gates.detach(), labels) for site, gates in network.gates().items()})
        return compute(network, h, labels, num_clients)

    def after_backward(leaves: Tensors, grads: Tensors, frozen: Tensors, step: int) -> None:
        for site, means in noted.items():
            frozen[f"{site}.fusion"].lerp_(means, 1.0 / (step + 1))

    return noted_loss, after_backward
