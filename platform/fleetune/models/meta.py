"""A network without weights: the same decoder over tensors of torch's meta device, for tracing what a step costs.

Its modules and its code are those of `Network`; 7 billion parameters take no memory. Only quantised layers are its own:
bitsandbytes' kernels do not run on tensors without content, so a layer here does what they do, operator by operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fleetune.models.architectures import ModelShape
from fleetune.models.base import PRODUCT_DTYPES, BaseModel, placed
from fleetune.models.config import LoRAConfig
from fleetune.models.decoder import Decoder
from fleetune.models.fused import product_dtype
from fleetune.models.network import Network, _adapt
from fleetune.models.outline import base_of, meta_weights
from fleetune.models.submodel import Submodel
from fleetune.tensors import Tensors

# fp32 numbers that bitsandbytes keeps for every nf4 matrix: the code tables of its scales and of its codes, and an offset.
NF4_TABLES = 256 + 16 + 1


class MetaNetwork(Network):
    """The first ``num_layers`` blocks of a meta base (`meta_base`), to be run under `cost.tracer.Tracer`.

    ``device`` stays the CPU, although the weights are on the meta device: what follows from the data alone (token ids, labels)
    is real in a trace, and code that moves it to the network's device must leave it real.
    """

    def __init__(self, base: BaseModel, num_layers: int, lora: LoRAConfig, *, precision: str):
        self.precision = precision
        self.submodel = Submodel.prefix(num_layers)
        weights = self.submodel.weights(base)
        self.model = Decoder(base, weights, num_layers, dtype=self.dtype, quantized=MetaQuantizedLinear)
        self.sites = _adapt(self.model, lora)
        self.model.eval()


def meta_base(shape: ModelShape, *, weights: str, precision: str) -> BaseModel:
    """An architecture's weights without content, as a worker would hold them. ``weights``: fp32, bf16, int8 or nf4.

    Matrices have the type ``weights``; beside quantised ones, embedding and head have that of the products. Norms and biases
    are fp32.
    """
    quantization = "none" if weights in PRODUCT_DTYPES else weights
    base = base_of(shape, meta_weights(shape, quantization), quantization)
    return placed(base, device="meta", precision=weights if quantization == "none" else precision)


class MetaQuantizedLinear(nn.Module):
    """Packed codes and their scales (`models.outline`); a product unpacks the matrix, forward and again backward.

    That is what bitsandbytes does, which keeps no unpacked copy. The signature is that of `models.quantize.quantized_linear`.
    """

    def __init__(
        self,
        weights: Tensors,
        name: str,
        kind: str,
        *,
        shape: tuple[int, int],
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.size = shape[::-1]  # (out, in)
        self.weight = _frozen(weights[name])  # nf4: two codes a byte, (out in / 2, 1); int8: (out, in)
        if kind == "nf4":
            self.scales = _frozen(weights[f"{name}.absmax"])  # uint8, one per 64 weights
            self.scales2 = _frozen(weights[f"{name}.nested_absmax"])  # fp32, one per 256 scales
            # In one piece: a product reads all of them, and a tensor counts as held if any of it is read.
            self.tables = _frozen(torch.empty(NF4_TABLES, device="meta"))
        else:
            self.scales = _frozen(weights[f"{name}.SCB"])  # fp32 (out,)
        self.bias = None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        y = _QuantizedProduct.apply(x.to(product_dtype(x)), self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in). The values mean nothing: what counts are the operators, and what they read and write."""
        if self.weight.dtype == torch.uint8:  # nf4: its scales are packed, too, and come first, in fp32
            self.scales.to(torch.float32).addcmul_(self.scales2[:1], self.tables[:1])
        else:
            self.scales.mul(1.0 / 127.0)
        packed = self.weight
        out = packed.new_empty(len(packed), self.size[0] * self.size[1] // len(packed), dtype=dtype)
        return out.copy_(packed).view(self.size)


class _QuantizedProduct(torch.autograd.Function):
    """x W^T (…, out) over a matrix that is unpacked each time; only the gradient of x is computed, as W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MetaQuantizedLinear) -> Tensor:
        ctx.layer = layer
        if layer.weight.dtype == torch.int8:
            ctx.x = x  # bitsandbytes keeps the input of an int8 product, although the backward pass does not read it
        return nn.functional.linear(x, layer.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.unpacked(grads[0].dtype), None


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
