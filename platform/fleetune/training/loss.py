"""Next-token loss per client, computed only at the positions whose target counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fleetune.data.batches import IGNORED
from fleetune.models.fused import cross_entropy
from fleetune.models.network import Network


def cohort_loss(network: Network, h: Tensor, labels: Tensor, num_clients: int) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each client over its own counted tokens.

    ``h (K b, S, D)`` are the hidden states after the last block, ``labels (K b, S)`` the token ids, -100 for tokens that do not
    count; position t predicts token t + 1. The head runs on the counted positions alone: with a prompt of the same length as
    the response that halves its cost and the memory of its logits. Returns losses (K,) and counted tokens (K,).
    """
    losses, counted = token_losses(network, h, labels)
    owner = counted // (labels[:, 1:].numel() // num_clients)  # (M,): each client has b (S - 1) targets in a row
    counts = torch.bincount(owner, minlength=num_clients)
    sums = torch.zeros(num_clients, dtype=losses.dtype, device=h.device).index_add(0, owner, losses)
    return sums / counts.clamp(min=1), counts  # a client with no counted token in this batch has loss 0, not NaN


def token_losses(network: Network, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """- log P of each of the M counted tokens, (M,), and its place among the K b (S - 1) targets, (M,), row by row.

    ``h (K b, S, D)`` and ``labels (K b, S)`` as in `cohort_loss`.
    """
    targets = labels[:, 1:].reshape(-1)  # (K b (S - 1),)
    counted = (targets != IGNORED).nonzero().squeeze(1)  # (M,), client by client
    positions = counted + counted // (labels.shape[1] - 1)  # the same tokens in h, whose rows are one longer
    # (M, V) from M counted positions: the largest matrix of a step.
    logits = network.logits(h.reshape(-1, h.shape[-1]).index_select(0, positions))
    return cross_entropy(logits, targets[counted]), counted
