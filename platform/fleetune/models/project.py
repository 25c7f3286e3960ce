"""Linear layers that read the same input, with the adapters of K clients, as one function with its gradient written out.

Autograd would make one gradient of the input for every layer and every adapter and then add them up, a pass over memory each;
here every product adds into the one before. The adapters' A are multiplied as one product of all their ranks:

        x (K b, S, in) ──► W_i ─────────────────────────────► + ──► y_i (K b, S, out_i)    with a residual: y_0 = h + …
            └─ as (K, b S, in) ──► A (K, r_1 + r_2 + …, in) ──► B_i (K, out_i, r_i) × alpha / r

Shape legend: K clients, b examples per client, S tokens, T = b S tokens of one client, N = K T tokens of all, R = r_1 + r_2 + ….
The rows of a batch go client by client, so (N, D) is (K, T, D) without a copy.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fleetune.models.fused import product_dtype

Factors = list[tuple[Tensor, Tensor]]
"""(A (K, r, in), B (K, out, r)) of every adapted layer; layers without an adapter have no entry."""


@dataclass(frozen=True)
class Projection:
    """One layer: its frozen weight and bias, and the factors of its adapters if it is adapted."""

    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # (out,)
    lora_a: Tensor | None = None  # (K, r, in)
    lora_b: Tensor | None = None  # (K, out, r)
    scaling: float = 1.0
    """alpha / r."""


def project(x: Tensor, layers: Sequence[Projection], residual: Tensor | None = None) -> tuple[Tensor, ...]:
    """x (K b, S, in) -> each layer's output (K b, S, out), the first of them added to ``residual`` if there is one.

    Products are carried out in the type of the autocast around them (`fused.product_dtype`), and so are their outputs; a sum
    with a residual has the residual's type.
    """
    dtype = product_dtype(x)
    adapted = tuple(i for i, layer in enumerate(layers) if layer.lora_a is not None)
    form = _Form(dtype, tuple(layer.scaling for layer in layers), adapted)
    # Autograd sees tensors only as single arguments, never inside a list or an object: so they are passed flat, and `_Form`
    # says how to sort them again.
    frozen = [t for layer in layers for t in (layer.weight, layer.bias)]
    factors = [t for i in adapted for t in (layers[i].lora_a, layers[i].lora_b)]
    # A product can only add into a matrix of its own type: under bf16 the fp32 residual is added afterwards.
    is_fused = residual is not None and residual.dtype == dtype
    first, *others = _Project.apply(x.to(dtype), residual if is_fused else None, form, *frozen, *factors)
    return (first if residual is None or is_fused else residual + first, *others)


@dataclass(frozen=True)
class _Form:
    """All about the layers that is not a tensor."""

    dtype: torch.dtype
    """Of the products."""
    scalings: tuple[float, ...]
    """alpha / r of every layer."""
    adapted: tuple[int, ...]
    """Indices of the layers that have an adapter, ascending."""

    def parts(self, tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Factors]:
        """The flat arguments (W_0, bias_0, W_1, …, A, B, A, B, …), sorted: weights in the products' type, biases, factors."""
        stop = 2 * len(self.scalings)
        weights = [weight.to(self.dtype) for weight in tensors[:stop:2]]
        return weights, tensors[1:stop:2], list(zip(tensors[stop::2], tensors[stop + 1 :: 2], strict=True))


class _Project(torch.autograd.Function):
    """`project` with all types already equal. Its gradients: of x, the residual and the factors; the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, form: _Form, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, factors = form.parts(tensors)
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        ys = [_linear(flat, weight, bias) for weight, bias in zip(weights[1:], biases[1:], strict=True)]
        ys.insert(0, _linear(flat, weights[0], biases[0], residual))
        middle = None  # x A^T of all adapters: (K, T, R)
        if factors:
            middle = _by_client(flat, factors) @ _joined_a(factors, form.dtype).mT
            for i, part, (_, b) in zip(form.adapted, _by_rank(middle, factors), factors, strict=True):
                # A view of ys[i], which nobody else holds yet, so that writing into it changes ys[i] and no one's input.
                y = _by_client(ys[i], factors)
                torch.baddbmm(y, part, b.to(form.dtype).mT, alpha=form.scalings[i], out=y)
        out = tuple(y.view(*x.shape[:-1], -1) for y in ys)
        # In the lowest block x is the embedding, which needs no gradient, and neither do outputs that no adapter and no residual
        # reaches. Autograd would still take all outputs for differentiable and run their backward for nothing.
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(
                *(y for i, y in enumerate(out) if i not in form.adapted and (i or residual is None))
            )
        ctx.set_materialize_grads(False)  # an output that nobody reads gives None to backward, and no matrix of zeros
        ctx.form, ctx.has_residual = form, residual is not None
        # x is for the gradient of A alone. The weights are saved as they came, not in the products' type: no copy is kept.
        ctx.save_for_backward(x if factors else None, middle, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """From the outputs' gradients g_i (K b, S, out_i), with s_i = alpha / r_i:

        d_middle_i = s_i g_i B_i,  dx = sum_i g_i W_i + d_middle A,  dA = d_middle^T x,  dB_i = s_i g_i^T middle_i.
        """
        form: _Form = ctx.form
        x, middle, *tensors = ctx.saved_tensors
        weights, _, factors = form.parts(tensors)
        shape = next(g for g in grads if g is not None).shape[:-1]
        flats = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]  # (N, out_i) each
        d_middle, d_factors = _factor_gradients(form, flats, x, middle, factors) if factors else (None, [])
        dx = None
        if ctx.needs_input_grad[0]:
            for flat, weight in zip(flats, weights, strict=True):
                if flat is not None:
                    # The first product makes dx (N, in), the others add into it: it is ours, never one of the grads, which
                    # autograd may have handed to others as well and which must not be written to.
                    dx = flat @ weight if dx is None else torch.addmm(dx, flat, weight, out=dx)
            if d_middle is not None and dx is not None:
                by_client = _by_client(dx, factors)
                torch.baddbmm(by_client, d_middle, _joined_a(factors, form.dtype), out=by_client)
        d_residual = grads[0] if ctx.has_residual else None  # y_0 = residual + …, so it is g_0 itself
        # One entry per argument of `forward`: x, residual, form, weights and biases, factors.
        none = (None,) * (1 + 2 * len(weights))
        return (None if dx is None else dx.view(*shape, -1), d_residual, *none, *d_factors)


def _factor_gradients(
    form: _Form, grads: Sequence[Tensor | None], x: Tensor, middle: Tensor, factors: Factors
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of ``middle = x A^T`` (K, T, R), and those of every A and B in turn, in the type of the factor.

    ``grads`` (N, out_i) are those of the layers' outputs, None for an output that nobody reads: its adapter gets zeros, so that
    the joined product covers all ranks. ``x`` (K b, S, in), ``middle`` (K, T, R).
    """
    d_middles, d_bs = [], []
    for i, part, (_, b) in zip(form.adapted, _by_rank(middle, factors), factors, strict=True):
        grad = grads[i]
        g = part.new_zeros(*part.shape[:2], b.shape[1]) if grad is None else _by_client(grad, factors)
        # B and dB are scaled, not g (N, out_i), which has far more numbers.
        d_middles.append(g @ (b * form.scalings[i]).to(form.dtype))
        d_bs.append((g.mT @ part).mul_(form.scalings[i]).to(b.dtype))
    d_middle = _joined(d_middles, -1)
    d_joined = d_middle.mT @ _by_client(x.reshape(-1, x.shape[-1]), factors)  # (K, R, in)
    d_as = (d_a.mT.to(a.dtype) for d_a, (a, _) in zip(_by_rank(d_joined.mT, factors), factors, strict=True))
    return d_middle, [d for pair in zip(d_as, d_bs, strict=True) for d in pair]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """residual + x W^T + bias as one product: (N, in) -> (N, out). The residual (K b, S, out) is read, not written to."""
    if residual is not None:
        y = torch.addmm(residual.reshape(-1, residual.shape[-1]), x, weight.mT)
        return y if bias is None else y.add_(bias)
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _by_client(x: Tensor, factors: Factors) -> Tensor:
    """(N, D) -> (K, T, D), a view; ``view`` fails rather than copies, as callers write through it."""
    return x.view(factors[0][0].shape[0], -1, x.shape[-1])


def _by_rank(x: Tensor, factors: Factors) -> tuple[Tensor, ...]:
    """(…, R) -> each adapter's (…, r), views."""
    return x.split([a.shape[1] for a, _ in factors], -1)


def _joined_a(factors: Factors, dtype: torch.dtype) -> Tensor:
    """The A of all adapters below one another, (K, R, in)."""
    return _joined([a for a, _ in factors], 1).to(dtype)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
