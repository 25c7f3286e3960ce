"""A decoder of the Llama family: plain modules over weights that are there already, by the names of its checkpoint.

transformers has the same modules, but importing them costs every worker seconds, in which a small model could have trained.
tests/models/test_network.py holds the two to the same logits, gradients and generated tokens. Costs are traced on these
modules, too, over weights that have sizes and no content (`models.meta`).

Shape legend: B examples, S tokens, D hidden size, V vocabulary, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fleetune.models.base import BaseModel
from fleetune.models.checkpoint import ATTENTION as ATTENTION
from fleetune.models.config import LINEAR_NAMES
from fleetune.models.fused import product_dtype
from fleetune.models.quantize import quantized_linear
from fleetune.tensors import Tensors


class Decoder(nn.Module):
    """Embedding, ``num_layers`` blocks, norm and head over ``weights``, which are not copied.

    ``dtype`` is the type in which quantised layers multiply, and ``quantized`` makes such a layer: bitsandbytes' own, or a
    stand-in for weights without content. Raises ValueError if the weights lack a tensor.
    """

    def __init__(
        self,
        base: BaseModel,
        weights: Tensors,
        num_layers: int,
        *,
        dtype: torch.dtype = torch.float32,
        quantized: Callable[..., nn.Module] = quantized_linear,
    ):
        super().__init__()
        take = _Weights(base, weights, dtype, quantized)
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
        """Token ids (…) -> (…, D), in fp32 if the matrix is stored in less: the residual stream starts here."""
        rows = nn.functional.embedding(ids, self.weight)
        return rows.float() if rows.dtype.itemsize < 4 else rows


class Linear(nn.Module):
    """x W^T + b with frozen W (out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        # Autocast would convert all three, but it does not see tensors without content, on which costs are traced.
        dtype = product_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class Norm(nn.Module):
    """The gain and epsilon of an RMSNorm, which `fleetune.models.block.norm` carries out."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps


class Rotary(nn.Module):
    """cos and sin of token positions (Su et al. 2021, arXiv 2104.09864), with the scaling that the model's config asks for."""

    inv_freq: Tensor  # (d / 2,)

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
    """Inverse frequencies (d / 2,), theta^(-2i / d), and the factor of cos and sin. transformers computes scaled ones."""
    rope: Mapping[str, Any] = base.config["rope_parameters"]
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, base.shape.head_dim, 2, dtype=torch.float) / base.shape.head_dim
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](base.hf_config())


class _Weights:
    """Takes weights by name and remembers those that are not there, so that one error can name several."""

    def __init__(self, base: BaseModel, weights: Tensors, dtype: torch.dtype, quantized: Callable[..., nn.Module]):
        self.base, self.weights, self.dtype, self.quantized = base, weights, dtype, quantized
        self.missing: list[str] = []

    def __call__(self, name: str) -> Tensor:
        if name not in self.weights:
            self.missing.append(name)
            return torch.empty(0)
        return self.weights[name]

    def norm(self, name: str) -> Norm:
        return Norm(self(f"{name}.weight"), float(self.base.config["rms_norm_eps"]))

    def linear(self, name: str, *, has_bias: bool) -> nn.Module:
        """A linear layer of a block, quantised if its matrix is stored as codes."""
        key = f"{name}.weight"
        weight, bias = self(key), self(f"{name}.bias") if has_bias else None
        if weight.is_floating_point():
            return Linear(weight, bias)
        shape = self.base.shape.linears[name.rpartition(".")[2]]
        kind = self.base.quantization
        return self.quantized(self.weights, key, kind, shape=shape, bias=bias, dtype=self.dtype)


def _block(base: BaseModel, take: _Weights, name: str) -> nn.Module:
    """The modules of one block, which `models.block.run_block` runs; ``name`` is their place in the checkpoint."""
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
