"""The chosen experts of a pool of rank-one experts, each token with experts and weights of its own, in two forms.

        y_t = sum_{m = 1..q} w_tm b_(i_tm) <a_(i_tm), x_t>          index i (T, q), weights w (T, q)

The gathered form computes the chosen experts alone: 2 T q (in + out) FLOPs and T q inner products, whatever the pool's size. The
masked form computes all M and sets the weights of the others to 0. It is two dense products, which a processor does faster as
long as the pool is not many times larger than q (`benchmarks/routed.py`). Their values agree to rounding.

On a processor the faster form runs, elsewhere the masked one. What is traced for its costs, on tensors without data, is always
the gathered one: a device is charged for the experts that its tokens choose.

Shape legend: T tokens of all clients, M experts in the pool, q chosen per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SUM = 0  # the mode of PyTorch's bags that adds rows up

GATHERS_FROM = 4
"""The pool's experts for each chosen one from which gathering is the faster form on a processor."""


def routed(
    x: Tensor, weights: Tensor, index: Tensor, a: Tensor, b: Tensor, *, is_gathered: bool | None = None
) -> Tensor:
    """x (T, in), weights and index (T, q), a (M, in), b (M, out) -> (T, out). The pool is frozen: a and b get no gradient.

    ``is_gathered``: which form is computed; None: what `gathers` says.
    """
    return _Routed.apply(x, weights, index, a, b, gathers(x, index, a) if is_gathered is None else is_gathered)


def gathers(x: Tensor, index: Tensor, a: Tensor) -> bool:
    """True if the gathered form is computed: it is traced, or faster for these sizes. PyTorch's bags are for fp32 here."""
    is_faster = x.device.type == "cpu" and x.dtype == torch.float32 and len(a) >= GATHERS_FROM * index.shape[1]
    return x.is_meta or is_faster


class _Routed(torch.autograd.Function):
    """`routed`, with its gradients written out: dw_tm = <g_t, b_i> <a_i, x_t>,  dx_t = sum_m w_tm <g_t, b_i> a_i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, index: Tensor, a: Tensor, b: Tensor, is_gathered: bool) -> Tensor:
        inner = _products(x, a, index, is_gathered)
        ctx.is_gathered = is_gathered
        ctx.save_for_backward(weights, index, inner, a, b)
        return _mixture(weights * inner, b, index, is_gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, index, inner, a, b = ctx.saved_tensors
        outer = _products(grads[0], b, index, ctx.is_gathered)  # <g_t, b_i>, (T, q)
        dx = _mixture(weights * outer, a, index, ctx.is_gathered) if ctx.needs_input_grad[0] else None
        return dx, outer * inner, None, None, None, None


def _products(x: Tensor, rows: Tensor, index: Tensor, is_gathered: bool) -> Tensor:
    """<x_t, rows_i> for each token's own rows: x (T, D), rows (M, D), index (T, q) -> (T, q)."""
    if not is_gathered:
        return (x @ rows.mT).gather(1, index)
    # PyTorch has this as the gradient of a bag's weights: no copy of the chosen rows, (T, q, D), is made.
    num_tokens, num_chosen = index.shape
    bags = torch.arange(num_tokens, device=x.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(),
        rows,
        index.reshape(-1),
        bags * num_chosen,  # where each token's rows begin in the flat index
        bags.repeat_interleave(num_chosen, output_size=num_tokens * num_chosen),  # the token of each
        _SUM,
    ).view(index.shape)


def _mixture(weights: Tensor, rows: Tensor, index: Tensor, is_gathered: bool) -> Tensor:
    """sum_m weights_tm rows_(i_tm): weights and index (T, q), rows (M, D) -> (T, D)."""
    if not is_gathered:
        return weights.new_zeros(len(weights), len(rows)).scatter_(1, index, weights) @ rows
    num_tokens, num_chosen = index.shape
    starts = torch.arange(num_tokens, device=weights.device) * num_chosen
    out, *_ = torch.ops.aten._embedding_bag(rows, index.reshape(-1), starts, False, _SUM, False, weights.reshape(-1))
    return out
