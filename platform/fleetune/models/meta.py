"""A network without weights: any architecture's modules over tensors that may be fake, for tracing what a step costs.

It runs the same code as `Network` (blocks, adapters, norm, head); only where its weights come from differs. It is built
under a fake tensor mode, so that 7 billion parameters take no memory.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fleetune.models.architectures import ModelShape
from fleetune.models.base import PRODUCT_DTYPES
from fleetune.models.config import LoRAConfig
from fleetune.models.fused import product_dtype
from fleetune.models.network import ATTENTION, Network, _adapt

NF4_BLOCK, NF4_BLOCK2 = (
    64,
    256,
)  # weights per 8-bit scale, scales per fp32 scale: Dettmers et al. 2023, arXiv 2305.14314
NF4_TABLES = (
    256 + 16 + 1
)  # fp32 that bitsandbytes keeps per matrix: code tables of the scales and of the codes, an offset


class MetaNetwork(Network):
    """The network of an architecture in a storage type and a precision: ``weights`` fp32, bf16, int8 or nf4."""

    def __init__(self, shape: ModelShape, num_layers: int, lora: LoRAConfig, *, weights: str, precision: str):
        self.precision = precision
        self.model = _Model(shape, num_layers, weights, precision).requires_grad_(False).eval()
        self.sites = _adapt(self.model, lora)
        self.model.eval()


class _Model(nn.Module):
    """Matrices are stored as ``weights`` says (beside quantised ones in the products' type), norms and biases in fp32."""

    def __init__(self, shape: ModelShape, num_layers: int, weights: str, precision: str):
        super().__init__()
        dtype = PRODUCT_DTYPES[weights if weights in PRODUCT_DTYPES else precision]
        self.config = SimpleNamespace(hidden_size=shape.hidden_size)
        self.model = nn.Module()
        self.model.embed_tokens = _Embedding(shape.vocab_size, shape.hidden_size, dtype)
        self.model.layers = nn.ModuleList(_block(shape, weights) for _ in range(num_layers))
        self.model.norm = _Norm(shape.hidden_size)
        self.model.rotary_emb = _Rotary(shape.head_dim)
        self.lm_head = _Linear(shape.hidden_size, shape.vocab_size, False, dtype)
        if shape.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


def _block(shape: ModelShape, weights: str) -> nn.Module:
    block: Any = nn.Module()
    block.self_attn, block.mlp = nn.Module(), nn.Module()
    for name, (num_in, num_out) in shape.linears.items():
        bias = name in shape.biased
        if weights in PRODUCT_DTYPES:
            linear: nn.Module = _Linear(num_in, num_out, bias, PRODUCT_DTYPES[weights])
        else:
            linear = _QuantizedLinear(num_in, num_out, bias, weights)
        setattr(block.self_attn if name in ATTENTION else block.mlp, name, linear)
    block.self_attn.head_dim, block.self_attn.scaling = shape.head_dim, shape.head_dim**-0.5
    if shape.qk_norm:
        block.self_attn.q_norm, block.self_attn.k_norm = _Norm(shape.head_dim), _Norm(shape.head_dim)
    block.input_layernorm = _Norm(shape.hidden_size)
    block.post_attention_layernorm = _Norm(shape.hidden_size)
    return block


def _frozen(*size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)


class _Linear(nn.Module):
    def __init__(self, num_in: int, num_out: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.weight = _frozen(num_out, num_in, dtype=dtype)
        self.bias = _frozen(num_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)  # autocast does not see tensors without data, so what it does stands here
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class _Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = _frozen(vocab_size, hidden_size, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight).float()


class _Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight, self.variance_epsilon = _frozen(size), 1e-6


class _Rotary(nn.Module):
    """cos and sin of every position, by the operators of transformers' LlamaRotaryEmbedding."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.inv_freq = _frozen(head_dim // 2)

    def forward(self, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, :, None].float() * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)
        return (both.cos() * 1.0).to(h.dtype), (both.sin() * 1.0).to(h.dtype)


class _QuantizedLinear(nn.Module):
    """Packed codes and their scales; a product unpacks the whole matrix, forward and again backward, as bitsandbytes does."""

    def __init__(self, num_in: int, num_out: int, bias: bool, kind: str):
        super().__init__()
        self.size = (num_out, num_in)
        num = num_in * num_out
        if kind == "nf4":
            blocks = -(-num // NF4_BLOCK)
            self.weight = _frozen(num // 2, 1, dtype=torch.uint8)
            self.scales = _frozen(blocks, dtype=torch.uint8)
            self.scales2 = _frozen(-(-blocks // NF4_BLOCK2))
            self.tables = _frozen(NF4_TABLES)
        else:
            self.weight = _frozen(num, 1, dtype=torch.int8)
            self.scales = _frozen(num_out)
        self.bias = _frozen(num_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = _QuantizedProduct.apply(x.to(product_dtype(x)), self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in): the scales in fp32 first, where they are packed themselves."""
        if self.weight.dtype == torch.uint8:
            self.scales.to(torch.float32).addcmul_(self.scales2[:1], self.tables[:1])
        else:
            self.scales.mul(1.0 / 127.0)
        packed = self.weight
        out = packed.new_empty(len(packed), self.size[0] * self.size[1] // len(packed), dtype=dtype)
        return out.copy_(packed).view(self.size)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _QuantizedLinear) -> Tensor:
        ctx.layer = layer
        if layer.weight.dtype == torch.int8:
            ctx.x = x  # bitsandbytes keeps the input of an int8 product
        return nn.functional.linear(x, layer.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.unpacked(grads[0].dtype), None
