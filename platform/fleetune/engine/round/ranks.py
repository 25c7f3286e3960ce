"""Clients of unequal rank: each trains the first r_k rows of every A and columns of every B, and the server fills up.

Row i of A (and column i of B) is averaged over the clients that trained it, by their examples:

    A_i = sum_{k: r_k > i} p_k A_{k,i} / sum_{k: r_k > i} p_k

A row that no client of the round trained stays what it was sent as (as sum_k p_k times it, so but for rounding). Where
ranks are equal, the plain average is taken as it is. Slicing an adapter to its first ranks is that of HetLoRA (Cho et al.
2024, arXiv 2401.06432); its weighting by the adapters' norms is not used here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fleetune.tensors import Tensors


def rank_axis(name: str) -> int | None:
    """The dimension of an adapter tensor that counts its ranks: A is (r, in), B is (out, r)."""
    return 0 if name.endswith(".lora_A") else 1 if name.endswith(".lora_B") else None


def cut(tensors: Tensors, rank: int) -> Tensors:
    """The first ranks of every pair; other tensors as they are."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        axis = rank_axis(name)
        out[name] = tensor if axis is None else tensor.narrow(axis, 0, min(rank, tensor.shape[axis])).contiguous()
    return out


def shares_per_row(ranks: np.ndarray, weights: np.ndarray, full_rank: int) -> np.ndarray:
    """Sum of p_k over the clients that trained each rank row, (full_rank,), in client order."""
    return np.array([float(weights[ranks > i].sum()) for i in range(full_rank)])


def filled(tensors: Tensors, sent: Tensors, *, share: float, trained: np.ndarray) -> Tensors:
    """An upload (or a sum of them) at full rank, such that the plain weighted sum over all is the average by rows.

    ``sent``: the payload at full rank. ``share``: sum of p_k that is inside the tensors already (1: none is).
    ``trained``: what `shares_per_row` gave for the round.
    """
    out: Tensors = {}
    rows = torch.from_numpy(trained).float()
    for name, tensor in tensors.items():
        axis = rank_axis(name)
        if axis is None:
            out[name] = tensor
            continue
        shape = [-1, 1] if axis == 0 else [1, -1]
        per_row, there = rows.view(shape), tensor.shape[axis]
        kept = _kept(sent.get(name), tensor, axis, len(trained)) * ((per_row == 0) * share)
        kept.narrow(axis, 0, there).add_(tensor / per_row.narrow(axis, 0, there))
        out[name] = kept
    return out


def laid_over(tensors: Tensors, before: Tensors, full_rank: int) -> Tensors:
    """What a client keeps, at full rank: the ranks that it trained, over those it had before (none: zero)."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        axis = rank_axis(name)
        if axis is None or tensor.shape[axis] == full_rank:
            out[name] = tensor
            continue
        whole = _kept(before.get(name), tensor, axis, full_rank).clone()
        whole.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
        out[name] = whole
    return out


def _kept(before: Tensor | None, like: Tensor, axis: int, full_rank: int) -> Tensor:
    if before is not None:
        return before
    shape = list(like.shape)
    shape[axis] = full_rank
    return like.new_zeros(shape)
