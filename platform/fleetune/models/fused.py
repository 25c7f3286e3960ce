"""Pieces of a decoder with their gradients written out, because autograd's own take many passes over memory.

The frozen base has no gradient of its own, so only the gradient of the activations is computed. Shape legend as in network.py.
Sums and rotations are worked out in fp32 whatever the arithmetic of the products; what goes into a product has its type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fleetune.models import kernels


class _RMSNorm(torch.autograd.Function):
    """y = w x / rms(x), rms(x) = sqrt(mean x^2 + eps) (Zhang and Sennrich 2019, arXiv 1910.07467).

    x (…, D) is returned beside y. The residual stream goes on with that x, so its gradient arrives here as well and is added in
    the same pass; otherwise autograd would add the two in a pass of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # after the last block nobody reads the x that is returned: None, not zeros
        if kernels.takes(x, weight) and product_dtype(x) is x.dtype:
            y, inverse = kernels.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, inverse)
            return x, y
        wide = _at_least_fp32(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / rms(x): (…, 1)
        ctx.save_for_backward(x, weight, inverse)
        return x, (wide * inverse).mul_(weight).to(product_dtype(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        through, grad = grads  # of the x that was returned, and of y: (…, D) each
        if grad is None:
            return through, None, None
        x, weight, inverse = ctx.saved_tensors
        if kernels.takes(grad, x, weight):
            return kernels.rms_norm_backward(grad, x, weight, inverse, through), None, None
        wide = _at_least_fp32(x)
        g = grad.to(wide.dtype) * weight
        # dx = g / rms - x <g, x> / (D rms^3)
        shared = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(inverse.pow(3)).div_(x.shape[-1])
        g.mul_(inverse).addcmul_(wide, shared, value=-1)
        # Written into g, which was made above: `through` and `grad` belong to autograd, which may add them elsewhere too.
        return (g if through is None else g.add_(through)).to(x.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) up, silu(x) = x sigmoid(x) (Shazeer 2020, arXiv 2002.05202), all (…, D).

    The compiled kernel computes silu(gate) again in the backward pass instead of keeping it.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        if kernels.takes(gate, up):
            ctx.save_for_backward(gate, up, None)
            return kernels.swiglu(gate, up)
        silu = nn.functional.silu(gate)
        ctx.save_for_backward(gate, up, silu)
        return silu * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, silu = ctx.saved_tensors
        if silu is None:
            return kernels.swiglu_backward(grads[0], gate, up)
        return torch.ops.aten.silu_backward(grads[0] * up, gate), grads[0] * silu


class _Rotary(torch.autograd.Function):
    """Rotation of the pairs (x_i, x_{i + d/2}) by position (Su et al. 2021, arXiv 2104.09864).

    A rotation's transpose is its inverse, so the gradient is rotated back and x need not be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


class _Attention(torch.autograd.Function):
    """Causal attention with rotary positions, compiled.

    For the backward pass it keeps its inputs and two numbers per query: the largest score and 1 / sum of exponentials, from
    which the probabilities are computed again. Kept, they would take S times as many numbers.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        out, largest, inverse = kernels.attention(q, k, v, cos, sin, scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, cos, sin, largest, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, largest, inverse = ctx.saved_tensors
        d_qkv = kernels.attention_backward(grads[0], q, k, v, cos, sin, ctx.scale, largest, inverse)
        return *d_qkv, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """log sum_v exp(x_v) - x_target, compiled: its gradient takes one matrix of the logits' size, PyTorch's takes three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, log_sums = kernels.cross_entropy(logits, targets)
        ctx.save_for_backward(logits, targets, log_sums)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return kernels.cross_entropy_backward(grads[0], *ctx.saved_tensors), None


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a product over ``x`` is carried out: that of the autocast around it, else its own."""
    kind = "cpu" if x.is_meta else x.device.type  # tensors without data stand for the CPU's
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _at_least_fp32(x: Tensor) -> Tensor:
    """bf16 as fp32, since sums of squares lose too much in bf16; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (…, D) itself, and its RMSNorm with a frozen gain ``weight (D,)``, in the type of the products that read it."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gate of the feed-forward part: silu(gate) up, of equal shapes (…, D)."""
    return _SwiGLU.apply(gate, up)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Each row's loss (M,): logits (M, V) at targets (M,)."""
    if kernels.takes(logits):
        return _CrossEntropy.apply(logits, targets)
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """Causal attention with rotary positions: q (B, S, heads, d), k and v (B, S, kv heads, d) -> (B, S, heads, d).

    ``cos, sin`` (B or 1, 1, S, d) are those of the tokens' positions; every token attends to itself and to those before it.
    """
    if kernels.takes(q, k, v, cos, sin) and q.shape[1] <= kernels.MAX_TOKENS:
        return _Attention.apply(q, k, v, cos, sin, scale)
    q, k, v = rotary(q.transpose(1, 2), cos, sin), rotary(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x (B, heads, S, d)`` by ``cos, sin (B or 1, 1, S, d)``."""
    return _Rotary.apply(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotate forward (``sign`` 1) or back (-1). cos and sin hold each angle twice, at i and at i + d/2."""
    if kernels.takes(x, cos, sin):
        return kernels.rotate(x, cos, sin, sign)
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out.to(x.dtype)
