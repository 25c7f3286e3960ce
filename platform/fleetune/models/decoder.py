"""A decoder of the Llama family: plain modules over weights that are there already, by the names of its checkpoint.

transformers has the same modules, and importing them costs every worker seconds that a small model does not train in.
tests/models/test_network.py holds the two to the same logits, gradients and generated tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fleetune.models.base import BaseModel
from fleetune.models.checkpoint import ATTENTION as ATTENTION
from fleetune.models.config import LINEAR_NAMES
from fleetune.models.quantize import quantized_linear
from fleetune.tensors import Tensors


class Decoder(nn.Module):
    """Embedding, ``num_layers`` blocks, norm and head, where the weights lie; nothing is copied. ``dtype``: of the products of
    quantised layers. ValueError where the weights lack one of them."""

    def __init__(self, base: BaseModel, weights: Tensors, num_layers: int, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        take = _Weights(base, weights, dtype)
        inner: Any = nn.Module()
        inner.embed_tokens = Embedding(take("model.embed_tokens.weight"))
        inner.layers = nn.ModuleList(_block(base, take, f"model.layers.{n}") for n in range(num_layers))
        inner.norm = take.norm("model.norm")
        inner.rotary_emb = Rotary(base).to(inner.norm.weight.device)
        self.model = inner
        tied = base.config.get("tie_word_embeddings", False)
        self.lm_head = Linear(inner.embed_tokens.weight if tied else take("lm_head.weight"))
        if take.missing:
            raise ValueError(f"the checkpoint of {base.name} lacks {', '.join(take.missing[:4])}")
        self.requires_grad_(False).eval()


class Embedding(nn.Module):
    """Rows of a matrix (V, D)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids -> (…, D)."""
        return nn.functional.embedding(ids, self.weight)


class Linear(nn.Module):
    """x W^T + b with frozen W (out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return nn.functional.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """The gain and epsilon of an RMSNorm, which `fleetune.models.block.norm` carries out."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps


class Rotary(nn.Module):
    """cos and sin of token positions (Su et al. 2021, arXiv 2104.09864), with the scaling that the model's config asks for."""

    inv_freq: Tensor

    def __init__(self, base: BaseModel):
        super().__init__()
        inv_freq, self.attention_scaling = _frequencies(base)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, S) -> cos, sin (B, S, d) in the type of ``h``."""
        angles = positions[..., None].float() * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)
        cos, sin = both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
        return cos.to(h.dtype), sin.to(h.dtype)


def _frequencies(base: BaseModel) -> tuple[Tensor, float]:
    """Inverse frequencies (d / 2,), theta^(-2i / d), and the factor of cos and sin. Scaled ones come from transformers."""
    rope: Mapping[str, Any] = base.config["rope_parameters"]
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, base.shape.head_dim, 2, dtype=torch.float) / base.shape.head_dim
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](base.hf_config())


class _Weights:
    """Takes weights by name and remembers those that are not there."""

    def __init__(self, base: BaseModel, weights: Tensors, dtype: torch.dtype):
        self.base, self.weights, self.dtype = base, weights, dtype
        self.missing: list[str] = []

    def __call__(self, name: str) -> Tensor:
        if name not in self.weights:
            self.missing.append(name)
            return torch.empty(0)
        return self.weights[name]

    def norm(self, name: str) -> Norm:
        return Norm(self(f"{name}.weight"), float(self.base.config["rms_norm_eps"]))

    def linear(self, name: str, *, has_bias: bool) -> nn.Module:
        """A layer of a block, quantised where its codes are."""
        key = f"{name}.weight"
        weight, bias = self(key), self(f"{name}.bias") if has_bias else None
        if weight.is_floating_point():
            return Linear(weight, bias)
        shape = self.base.shape.linears[name.rpartition(".")[2]]
        kind = self.base.quantization
        return quantized_linear(self.weights, key, kind, shape=shape, bias=bias, dtype=self.dtype)


def _block(base: BaseModel, take: _Weights, name: str) -> nn.Module:
    shape = base.shape
    block: Any = nn.Module()
    block.self_attn, block.mlp = nn.Module(), nn.Module()
    for linear in LINEAR_NAMES:
        part = "self_attn" if linear in ATTENTION else "mlp"
        setattr(getattr(block, part), linear, take.linear(f"{name}.{part}.{linear}", has_bias=linear in shape.biased))
    block.self_attn.head_dim, block.self_attn.scaling = shape.head_dim, shape.head_dim**-0.5
    if shape.qk_norm:
        block.self_attn.q_norm = take.norm(f"{name}.self_attn.q_norm")
        block.self_attn.k_norm = take.norm(f"{name}.self_attn.k_norm")
    block.input_layernorm = take.norm(f"{name}.input_layernorm")
    block.post_attention_layernorm = take.norm(f"{name}.post_attention_layernorm")
    return block
