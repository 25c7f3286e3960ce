"""One decoder block of the Llama family, run over the modules that transformers built. Checked against their own forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fleetune.models.fused import rms_norm, rotary


def run_block(layer: Any, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """h (B, S, D) -> (B, S, D): causal attention and SwiGLU, each on a normed copy and added to the residual stream."""
    h = h + _attention(layer.self_attn, norm(layer.input_layernorm, h), cos, sin)
    x = norm(layer.post_attention_layernorm, h)
    mlp = layer.mlp
    return h + mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def norm(module: Any, x: Tensor) -> Tensor:
    """A transformers RMSNorm module."""
    return rms_norm(x, module.weight, module.variance_epsilon)


def _attention(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = (*x.shape[:-1], -1, attention.head_dim)  # (B, S, heads, d)
    q, k, v = (project(x).view(heads) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):  # Qwen3 norms every head
        q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
    q, k = rotary(q.transpose(1, 2), cos, sin), rotary(k.transpose(1, 2), cos, sin)
    grouped = q.shape[1] != k.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        q, k, v.transpose(1, 2), is_causal=True, scale=attention.scaling, enable_gqa=grouped
    )
    return attention.o_proj(out.transpose(1, 2).reshape(*x.shape[:-1], -1))
