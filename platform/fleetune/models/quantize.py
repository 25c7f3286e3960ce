"""Quantised storage of frozen linear layers through bitsandbytes: nf4 with double quantisation, or int8 by row.

A quantised matrix ``p.weight`` is kept as the packed codes under that name and its statistics under ``p.weight.<stat>``,
all plain tensors, so that a quantised base is shared between processes as any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fleetune.models.config import LINEAR_NAMES
from fleetune.tensors import Tensors


def is_linear(name: str) -> bool:
    """True if a checkpoint entry is the matrix of a linear layer inside a block (never embeddings or the head)."""
    return ".layers." in name and name.endswith(".weight") and name.split(".")[-2] in LINEAR_NAMES


def quantize_linears(weights: Tensors, kind: str) -> Tensors:
    """Replace every block matrix by its codes and statistics; the rest stays as it is."""
    out: Tensors = {}
    for name, weight in weights.items():
        out.update(quantize(name, weight, kind) if is_linear(name) else {name: weight})
    return out


def quantize(name: str, weight: Tensor, kind: str) -> Tensors:
    """Codes and statistics of one matrix (out, in)."""
    from bitsandbytes import functional

    if kind == "nf4":
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return {name: codes, **{f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}}
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return {name: codes, f"{name}.SCB": scales}


def statistics(weights: Tensors, name: str) -> Tensors:
    """The statistics stored beside a quantised matrix, by their own names."""
    start = f"{name}."
    return {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}


def dequantize(weights: Tensors, name: str, kind: str) -> Tensor:
    """The matrix (out, in) in fp32 that the codes stand for."""
    if kind == "none" or not is_linear(name):
        return weights[name]
    stats = statistics(weights, name)
    if kind == "nf4":
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState.from_dict(stats, device=weights[name].device)
        return dequantize_4bit(weights[name], state).to(torch.float32)
    return weights[name].to(torch.float32) * (stats["SCB"] / 127.0)[:, None]  # int8 rows scaled by absmax / 127


def quantized_linear(
    weights: Tensors,
    name: str,
    kind: str,
    *,
    shape: tuple[int, int],
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A bitsandbytes layer over the stored codes, without copying them. ``shape``: (in, out); ``dtype``: of nf4's products."""
    import bitsandbytes as bnb

    num_in, num_out = shape
    stats = statistics(weights, name)
    layer: Any
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(
            num_in,
            num_out,
            bias=bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        codes = weights[name]
        layer.weight = bnb.nn.Params4bit.from_prequantized(codes, stats, requires_grad=False, device=codes.device)
        # On processors with AVX512-BF16 the layer would pack its codes anew for bf16 products: in place, although they are
        # shared, only for some shapes, and only where nothing is differentiated, so that evaluation rounded differently.
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = bnb.nn.Linear8bitLt(
            num_in, num_out, bias=bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        layer.weight = bnb.nn.Int8Params(weights[name], requires_grad=False, has_fp16_weights=False)
        layer.weight.CB, layer.weight.SCB = weights[name], stats["SCB"]
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
