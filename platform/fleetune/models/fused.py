"""Two pieces of a decoder block with their gradients written out, because autograd's own take many passes over memory.

The frozen base has no gradient of its own, so only the gradient of the activations is computed. Shape legend as in network.py.
Sums and rotations are worked out in fp32 whatever the arithmetic of the products; what goes into a product has its type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = w x / rms(x), rms(x) = sqrt(mean x^2 + eps) (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _at_least_fp32(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / rms(x): (…, 1)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(product_dtype(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide = _at_least_fp32(x)
        g = grads[0].to(wide.dtype) * weight
        # dx = g / rms - x <g, x> / (D rms^3)
        shared = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(inverse.pow(3)).div_(x.shape[-1])
        return g.mul_(inverse).addcmul_(wide, shared, value=-1).to(x.dtype), None, None


class _Rotary(torch.autograd.Function):
    """Rotation of the pairs (x_i, x_{i + d/2}) by position (Su et al. 2021, arXiv 2104.09864); its gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a product over ``x`` is carried out: that of the autocast around it, else its own."""
    kind = "cpu" if x.is_meta else x.device.type  # tensors without data stand for the CPU's
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension with a frozen gain, in the type of the products that take it up."""
    return _RMSNorm.apply(x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x (B, heads, S, d)`` by ``cos, sin (1, 1, S, d)``."""
    return _Rotary.apply(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out.to(x.dtype)
