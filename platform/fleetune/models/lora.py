"""LoRA over a full cohort: K clients share one frozen linear layer and bring a pair (A_k, B_k) each.

        x (K b, S, in) ──► base.weight ───────────────► + ──► y (K b, S, out)
            └─ as (K, b S, in) ──► A (K, r, in) ──► B (K, out, r) × alpha / r ──┘

The base sees all clients' tokens as one large product; the adapters are batched products. One client is K = 1 of the
same code, which is why it is the reference for the stacked path and not another implementation of it.
Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fleetune.models.config import LoRAConfig
from fleetune.models.fused import product_dtype
from fleetune.models.pools import Mixture, Pool
from fleetune.models.project import Projection, project
from fleetune.seeds import seed_of
from fleetune.tensors import Tensors


class AdaptedLinear(nn.Module):
    """A frozen linear layer with the adapters of K clients beside it; without adapters it is the layer itself."""

    def __init__(self, base: nn.Module, *, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.base: Any = base
        self.scaling, self.dropout = scaling, dropout
        self.lora_A: Tensor | None = None  # (K, r, in)
        self.lora_B: Tensor | None = None  # (K, out, r)
        self.pool: Pool | None = None  # frozen pairs of adapters that exist already
        self.beside: Mixture | None = None  # what is made of the pool and added to the output
        self._merged: Tensor | None = None  # (out, in), the base's matrix with what is held added to it
        self._delta: Tensor | None = None  # (out, in), what is held beside a quantised matrix

    @property
    def weight(self) -> Tensor:
        """The frozen matrix (out, in), or its codes if it is quantised."""
        return self.base.weight if self._merged is None else self._merged

    def hold(self, delta: Tensor | None) -> None:
        """Add a frozen matrix (out, in) to the base's; None takes it away. A quantised matrix keeps it beside its codes."""
        self._merged = self._delta = None
        if delta is None:
            return
        weight = self.base.weight
        if not weight.is_floating_point():
            self._delta = delta
        elif (
            not delta.is_meta
        ):  # what is traced has a size alone, and adding to the weights where they lie takes no memory
            self._merged = (weight.float() + delta).to(weight.dtype)

    def _frozen(self, x: Tensor) -> Tensor:
        """The product without the clients' adapters: x (K b, S, in) -> (K b, S, out)."""
        if self._merged is not None:
            return nn.functional.linear(x, self._merged.to(product_dtype(x)), self.base.bias)
        y = self.base(x)
        return y if self._delta is None else y + nn.functional.linear(x, self._delta.to(x.dtype)).to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (K b, S, in) -> (K b, S, out)."""
        y = self._frozen(x)
        if self.lora_A is None or self.lora_B is None:
            return y
        num_clients = self.lora_A.shape[0]
        x_k = x.reshape(num_clients, -1, x.shape[-1])  # (K, b S, in)
        if self.dropout and self.training:
            x_k = nn.functional.dropout(x_k, self.dropout)
        y_k = y.view(num_clients, -1, y.shape[-1])  # (K, b S, out); rows go client by client
        dtype = product_dtype(x)
        a, b = self.lora_A.mT.to(dtype), self.lora_B.mT.to(dtype)
        return torch.baddbmm(y_k, x_k @ a, b, alpha=self.scaling).view(y.shape)


def linears(x: Tensor, layers: Sequence[Any], residual: Tensor | None = None) -> tuple[Tensor, ...]:
    """Linear layers, adapted or not, on the same x: (K b, S, in) -> (K b, S, out) each, with what stands beside them.

    The first one's output is added to ``residual`` (K b, S, out) if there is one. Layers with plain weights run as one
    function (`fleetune.models.project`). Quantised layers and adapters with dropout are not fused: each layer runs on its own.
    """
    plain = [_as_projection(layer) for layer in layers]
    if all(plain):
        ys = project(x, [layer for layer in plain if layer], residual)
    else:
        first, *others = (layer(x) for layer in layers)
        ys = (first if residual is None else residual + first, *others)
    return tuple(_with_mixture(y, x, layer) for y, layer in zip(ys, layers, strict=True))


def _with_mixture(y: Tensor, x: Tensor, layer: Any) -> Tensor:
    """A layer's output y (K b, S, out) with what its pool makes of its input x (K b, S, in)."""
    beside = layer.beside if isinstance(layer, AdaptedLinear) else None
    return y if beside is None else y + beside(x)


def _as_projection(layer: Any) -> Projection | None:
    """The layer for `project`; None if it cannot be fused."""
    is_adapted = isinstance(layer, AdaptedLinear)
    bias = layer.base.bias if is_adapted else layer.bias
    if not layer.weight.is_floating_point():
        return None
    if not is_adapted or layer.lora_A is None or layer.lora_B is None:
        return Projection(layer.weight, bias)
    if layer.dropout and layer.training:
        return None
    return Projection(layer.weight, bias, layer.lora_A, layer.lora_B, layer.scaling)


def init_lora(sites: Mapping[str, tuple[int, int]], config: LoRAConfig, *, run_seed: int) -> Tensors:
    """A fresh adapter for sites {name: (in, out)}: A (r, in) uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), B (out, r) = 0."""
    out: Tensors = {}
    for index, (site, (num_in, num_out)) in enumerate(sites.items()):
        generator = torch.Generator().manual_seed(seed_of(run_seed, "lora-init", index))
        bound = 1.0 / math.sqrt(num_in)
        out[f"{site}.lora_A"] = torch.empty(config.rank, num_in).uniform_(-bound, bound, generator=generator)
        out[f"{site}.lora_B"] = torch.zeros(num_out, config.rank)
    return out
