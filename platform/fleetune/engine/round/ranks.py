"""Clients of unequal rank: each trains the first r_k rows of every A and columns of every B, and the server fills up.

Row i of A (and column i of B) is averaged over the clients that trained it, by their examples:

    A_i = sum_{k: r_k > i} p_k A_{k,i} / sum_{k: r_k > i} p_k

A row that no client of the round trained stays what it was sent as (as sum_k p_k times it, so but for rounding). Where
ranks are equal, the plain average is taken as it is. Slicing an adapter to its first ranks is that of HetLoRA (Cho et al.
2024, arXiv 2401.06432); its weighting by the adapters' norms is not used here.

A is (r, in) and B is (out, r) throughout; R is the full rank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fleetune.engine.round.work import Work
from fleetune.models.adapters import AXES, Axes, rank_axis
from fleetune.tensors import Tensors


def weight_per_row(ranks: np.ndarray, weights: np.ndarray, full_rank: int) -> np.ndarray:
    """Sum of p_k over the clients that trained each rank row, (R,). ``ranks`` and ``weights``: (n,), in client order."""
    return np.array([float(weights[ranks > i].sum()) for i in range(full_rank)])


def trained_rows(work: Work, weights: np.ndarray) -> dict[int, np.ndarray]:
    """Index of a full payload that clients cut down -> what part of its clients' weight trained each of its rank rows, (R,).

    ``weights``: (n,), 0 for clients whose updates do not count.
    """
    sources = np.array(work.source)[work.payload_of]  # (n,): index of each client's full payload
    ranks, full_ranks = work.of_clients("rank"), work.full_ranks()
    out = {}
    for source in np.unique(sources[(ranks < full_ranks) & (weights > 0)]).tolist():
        members = sources == source
        # Sums within a group of clients come out as its part of all weights times the average, so rows are held against that.
        total = 1.0 if members.all() else float(weights[members].sum())
        counted = np.where(weights > 0, ranks, full_ranks)[members]
        out[source] = weight_per_row(counted, weights[members] / total, int(full_ranks[members].max()))
    return out


def filled(tensors: Tensors, sent: Tensors, *, total_weight: float, trained: np.ndarray, axes: Axes = AXES) -> Tensors:
    """An upload (or a sum of them) at full rank, such that the plain weighted sum over all is the average by rows.

    ``sent``: the payload at full rank. ``total_weight``: the sum of p_k that is inside the tensors already (1: none is).
    ``trained``: (R,), what `trained_rows` gave for that payload.

    The rows of the upload are divided by the weight of those that trained them, which is never 0, as the uploader is one of
    them. A row that nobody trained is the payload's, times the weight that the upload stands for; a row that only others
    trained is 0 here and comes from them.
    """
    out: Tensors = {}
    rows = torch.from_numpy(trained).float()
    for name, tensor in tensors.items():
        axis = rank_axis(name, axes)
        if axis is None:
            out[name] = tensor
            continue
        per_row = rows.view([-1 if n == axis else 1 for n in range(tensor.dim())])  # lies along the tensor's ranks
        rank = tensor.shape[axis]
        full = _or_zeros(sent.get(name), tensor, axis, len(trained)) * ((per_row == 0) * total_weight)
        full.narrow(axis, 0, rank).add_(tensor / per_row.narrow(axis, 0, rank))
        out[name] = full
    return out


def overlay(tensors: Tensors, before: Tensors, full_rank: int, axes: Axes = AXES) -> Tensors:
    """A client's private tensors at full rank: the ranks that it trained, over those that it had before (none: zero)."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        axis = rank_axis(name, axes)
        if axis is None or tensor.shape[axis] == full_rank:
            out[name] = tensor
            continue
        full = _or_zeros(before.get(name), tensor, axis, full_rank).clone()
        full.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
        out[name] = full
    return out


def _or_zeros(tensor: Tensor | None, like: Tensor, axis: int, full_rank: int) -> Tensor:
    """The tensor; if there is none, zeros in the shape of another one at full rank."""
    if tensor is not None:
        return tensor
    shape = list(like.shape)
    shape[axis] = full_rank
    return like.new_zeros(shape)
