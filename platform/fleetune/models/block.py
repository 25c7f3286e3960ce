"""One decoder block of the Llama family, run over its modules (`models.decoder`, or transformers', whose names are the same).

Shape legend: B examples, S tokens, D hidden size, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fleetune import scopes
from fleetune.models.adapters import BlockAdapter
from fleetune.models.fused import attention as causal
from fleetune.models.fused import rms_norm, swiglu
from fleetune.models.lora import linears

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(queries (B, S, heads, d), keys and values (B, S, kv heads, d), cos and sin of their positions, scale) -> (B, S, heads, d)."""


def run_block(layer: Any, h: Tensor, cos: Tensor, sin: Tensor, attend: Attend = causal) -> Tensor:
    """h (B, S, D) -> (B, S, D): attention and SwiGLU, each on a normed copy and added to the residual stream."""
    scopes.current.block = id(layer)  # tells a cost trace which block is at work
    gate = getattr(layer, "at_start", None)
    if gate is not None:
        gate(h)  # the block's linear layers read what it notes
    h, x = norm(layer.input_layernorm, h)
    x = _attention(layer.self_attn, x, cos, sin, attend)
    h = _added(h, x, layer.self_attn.o_proj, getattr(layer, "after_attention", None))
    h, x = norm(layer.post_attention_layernorm, h)
    gate, up = linears(x, [layer.mlp.gate_proj, layer.mlp.up_proj])
    return _added(h, swiglu(gate, up), layer.mlp.down_proj, getattr(layer, "after_mlp", None))


def _added(h: Tensor, x: Tensor, linear: Any, adapter: BlockAdapter | None) -> Tensor:
    """The residual stream h (B, S, D) with the half's output, linear(x), and what an adapter after that half makes of it."""
    if adapter is None:
        (h,) = linears(x, [linear], residual=h)
        return h
    (y,) = linears(x, [linear])
    return h + y + adapter(y)


def norm(module: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """h (…, D) as it is, for the residual stream, and its RMSNorm. Returning both lets their gradients be added in one pass."""
    return rms_norm(h, module.weight, module.variance_epsilon)


def _attention(module: Any, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
    """x (B, S, D) -> (B, S, heads d), before the output projection."""
    heads = (*x.shape[:-1], -1, module.head_dim)  # (B, S, heads, d)
    q, k, v = linears(x, [module.q_proj, module.k_proj, module.v_proj])
    q, k, v = q.view(heads), k.view(heads), v.view(heads)
    if hasattr(module, "q_norm"):  # Qwen3 norms every head
        q, k = norm(module.q_norm, q)[1], norm(module.k_norm, k)[1]
    return attend(q, k, v, cos, sin, module.scaling).reshape(*x.shape[:-1], -1)
