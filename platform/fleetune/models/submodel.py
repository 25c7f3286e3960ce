"""The blocks that a stage trains: a selection or a linear combination of the base model's blocks.

One value covers prefixes (ProgFed), selected layers (FedSODA) and fused groups (DevFT): block n of the submodel is
``sum_j w_j * block_j`` of the base. Adapters are named by position, ``layers.<n>.…``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fleetune.models.base import BaseModel
from fleetune.models.quantize import dequantize, is_linear, quantize, statistics
from fleetune.tensors import Tensors

Combination = tuple[tuple[int, float], ...]
"""(index j of a base block, its weight w_j), for each summand of one block of the submodel."""


@dataclass(frozen=True)
class Submodel:
    """Hashable description: for every block of the submodel, the base blocks and their weights."""

    layers: tuple[Combination, ...]

    @classmethod
    def prefix(cls, num_layers: int) -> Submodel:
        """The first ``num_layers`` blocks as they are (all of them: the full model)."""
        return cls(tuple(((j, 1.0),) for j in range(num_layers)))

    @classmethod
    def select(cls, layers: Sequence[int]) -> Submodel:
        """Some blocks of the base in the order given."""
        return cls(tuple(((j, 1.0),) for j in layers))

    @classmethod
    def from_values(cls, values: Sequence) -> Submodel:
        """From plain lists, as they travel in a payload."""
        return cls(tuple(tuple((int(j), float(w)) for j, w in combination) for combination in values))

    def to_values(self) -> list:
        """Plain lists, for a payload or a checkpoint."""
        return [[[j, w] for j, w in combination] for combination in self.layers]

    @property
    def num_layers(self) -> int:
        """Blocks of the submodel."""
        return len(self.layers)

    def is_whole(self, num_layers: int) -> bool:
        """True if this is the base model itself."""
        return self == Submodel.prefix(num_layers)

    def fuse_adapter(self, adapter: Tensors) -> Tensors:
        """The submodel's adapter from an adapter of all blocks: each tensor is combined like the block's weights."""
        return self._combine(adapter, "layers.")

    def weights(self, base: BaseModel) -> Tensors:
        """The submodel's weights from the base's. Blocks that are taken as they are share the base's memory.

        Codes of quantised matrices cannot be added: they are dequantised, combined and quantised again.
        """
        prefix = "model.layers."
        shared = {n: w for n, w in base.weights.items() if not n.startswith(prefix)}
        if all(len(c) == 1 and c[0][1] == 1.0 for c in self.layers) or base.quantization == "none":
            return {**shared, **self._combine(base.weights, prefix)}
        out = dict(shared)
        for n, combination in enumerate(self.layers):
            for suffix in _suffixes(base.weights, prefix, combination[0][0]):
                name = f"{prefix}{n}.{suffix}"
                source = f"{prefix}{combination[0][0]}.{suffix}"
                if not suffix.endswith((".weight", ".bias")):
                    continue  # statistics are made anew
                if is_linear(source) and len(combination) > 1:
                    parts = {
                        j: dequantize(base.weights, f"{prefix}{j}.{suffix}", base.quantization) for j, _ in combination
                    }
                    fused = combined([parts[j] for j, _ in combination], [w for _, w in combination])
                    out.update(quantize(name, fused, base.quantization))
                else:
                    one = [base.weights[f"{prefix}{j}.{suffix}"] for j, _ in combination]
                    out[name] = combined(one, [w for _, w in combination])
                    out.update({f"{name}.{k}": v for k, v in statistics(base.weights, source).items()})
        return out

    def _combine(self, tensors: Tensors, prefix: str) -> Tensors:
        out: Tensors = {}
        for n, combination in enumerate(self.layers):
            for suffix in _suffixes(tensors, prefix, combination[0][0]):
                parts = [tensors[f"{prefix}{j}.{suffix}"] for j, _ in combination]
                out[f"{prefix}{n}.{suffix}"] = combined(parts, [w for _, w in combination])
        return out


def combined(parts: list, weights: list[float]):
    """sum_j w_j x_j over tensors of one shape, summed in fp32; a single part of weight 1 is returned itself, not a copy."""
    if len(parts) == 1 and weights[0] == 1.0:
        return parts[0]
    # A plan's tensors have sizes and no numbers, and PyTorch would load half of its compiler to multiply them.
    if parts[0].is_meta:
        return torch.empty(parts[0].shape, dtype=parts[0].dtype, device="meta")
    total = parts[0].float() * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total.add_(part, alpha=weight)
    return total.to(parts[0].dtype)


def _suffixes(tensors: Tensors, prefix: str, layer: int) -> list[str]:
    """The names of one block's tensors after ``<prefix><layer>.``."""
    start = f"{prefix}{layer}."
    return [name.removeprefix(start) for name in tensors if name.startswith(start)]
