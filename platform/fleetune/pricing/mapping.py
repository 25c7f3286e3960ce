"""The architecture that is costed, and the trained model's method and payloads as they would be on it.

Depth is mapped by fraction: block p of the costed architecture gets the tensors of the trained block
floor(p · trained / costed). A tensor ``layers.<n>.<linear>.lora_A`` takes the costed linear's sizes and keeps its rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fleetune.errors import UserError
from fleetune.methods.base import Method, Payload, num_blocks
from fleetune.models.adapters import AXES, Axes, axes_of
from fleetune.models.architectures import ModelShape
from fleetune.models.base import BaseModel
from fleetune.models.network import linear_sites
from fleetune.models.nf4_rows import nf4_bytes
from fleetune.models.outline import NF4_TABLES, base_of
from fleetune.tensors import Tensors, num_bytes

_OF_A_BLOCK = re.compile(r"(?P<before>(?:.*\.)?layers\.)(?P<block>\d+)\.(?P<rest>.+)")


class CostedModel:
    """How a trained architecture maps onto the costed one, ``shape``; None: they are the same."""

    def __init__(
        self,
        base: BaseModel,
        shape: ModelShape | None = None,
        *,
        depth_ratio: float | None = None,
        axes: Axes = AXES,
    ):
        self.of, self.axes = base, axes
        self.trained = base.shape
        self.shape = shape or base.shape
        self.base = base if shape is None else base_of(shape)
        self.depth_ratio = depth_ratio or self.shape.num_layers / self.trained.num_layers

    def at_depth(self, num_layers: int, *, of: int) -> CostedModel:
        """The same architecture with ``num_layers`` blocks, which stand for ``of`` trained ones."""
        shape = replace(self.shape, num_layers=num_layers)
        return CostedModel(self.of, shape, depth_ratio=num_layers / of, axes=self.axes)

    def layers(self, num_layers: int) -> int:
        """Blocks of the costed architecture that stand for ``num_layers`` of the trained one."""
        return max(1, round(num_layers * self.depth_ratio))

    def method(self, method: Method) -> Method:
        """The method, set up for the costed architecture's depth and sizes."""
        context, config = method.context, method.config
        blocks = {
            name: min(self.layers(num_blocks(getattr(config, name), context.num_layers)), self.shape.num_layers - 1)
            for name in config.counts_blocks
        }
        sites = linear_sites(self.base, context.lora)
        costed = replace(context, base=self.base, sites=sites)
        return type(method)(config.model_copy(update=blocks), costed)

    def payload(self, payload: Payload, num_layers: int) -> Payload:
        """A payload for ``num_layers`` trained blocks, as it would be on the costed architecture; its tensors are empty.

        Raises UserError if the costed architecture has fewer blocks, and those of the payload are not alike.
        """
        source = self._sources(num_layers)
        if len(source) < num_layers and not _are_alike(payload, num_layers):
            raise UserError(
                f"has {len(source)} blocks for {num_layers} trained ones, which have different adapters: some of these would "
                "have no block that stands for them, and cost nothing",
                field="cost.model",
                value=self.shape.name,
                hint="take an architecture that is at least as deep as the trained model, or leave cost.model out",
            )
        return replace(
            payload,
            tensors=self._tensors(payload.tensors, source),
            server=self._tensors(payload.server, source),
            held=self._tensors(payload.held, source),
            values={name: _deepened(value, source, num_layers) for name, value in payload.values.items()},
        )

    def num_bytes(self, tensors: Tensors, num_layers: int) -> int:
        """Bytes of tensors about ``num_layers`` trained blocks, as they would be on the costed architecture."""
        with torch.device("meta"):
            return num_bytes(self._tensors(tensors, self._sources(num_layers)))

    def _sources(self, num_layers: int) -> list[int]:
        """For every costed block, the trained block that stands for it."""
        blocks = self.layers(num_layers)
        return [p * num_layers // blocks for p in range(blocks)]

    def _tensors(self, tensors: Mapping[str, Tensor], source: list[int]) -> Tensors:
        """Tensors for the costed blocks, each made by that of its trained block; the order of tensors in a block stays."""
        of_block: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
        out: Tensors = {}
        for name, tensor in tensors.items():
            found = _OF_A_BLOCK.fullmatch(name)
            if found is None:
                out[name] = torch.empty(self._size(name, tensor), dtype=tensor.dtype)
            else:
                key = (found["before"], int(found["block"]))
                of_block.setdefault(key, []).append((found["rest"], tensor))
        for before in dict.fromkeys(before for before, _ in of_block):
            for p, n in enumerate(source):
                for rest, tensor in of_block.get((before, n), ()):
                    out[f"{before}{p}.{rest}"] = torch.empty(self._size(rest, tensor), dtype=tensor.dtype)
        return out

    def _size(self, name: str, tensor: Tensor) -> list[int]:
        """The costed size of a tensor: by what its axes count if that is declared, and of the base's weights by their layer."""
        *_, linear, kind = ("", *name.split("."))
        axes = axes_of(name, self.axes)
        if axes is not None:
            sizes = {"hidden": self.shape.hidden_size}
            if linear in self.shape.linears:
                sizes["in"], sizes["out"] = self.shape.linears[linear]
                sizes["in_nf4"], sizes["out_nf4"] = nf4_bytes(sizes["in"]), nf4_bytes(sizes["out"])
            counted = zip(axes, tensor.shape, strict=True)
            return [self.layers(size) if axis == "blocks" else sizes.get(axis, size) for axis, size in counted]
        layer = next((part for part in name.split(".") if part in self.shape.linears), None)
        if kind in NF4_TABLES:
            return list(tensor.shape)
        if layer is not None:
            return [round(tensor.numel() * self._weight_ratio(layer, is_vector=kind == "bias"))]
        if linear.endswith("layernorm") or name == "model.norm.weight":
            return [self.shape.hidden_size]
        if linear in ("embed_tokens", "lm_head"):
            return [self.shape.vocab_size, self.shape.hidden_size]
        return list(tensor.shape)

    def _weight_ratio(self, linear: str, *, is_vector: bool) -> float:
        """Numbers of a linear layer's matrix (or bias) on the costed architecture, per number on the trained one."""
        (costed_in, costed_out), (num_in, num_out) = self.shape.linears[linear], self.trained.linears[linear]
        return costed_out / num_out if is_vector else costed_in * costed_out / (num_in * num_out)


def _deepened(value: Any, source: list[int], num_layers: int) -> Any:
    """A list with an entry for every trained block becomes one for every costed block; all else stays as it is."""
    if isinstance(value, list) and len(value) == num_layers:
        return [value[n] for n in source]
    return value


def _are_alike(payload: Payload, num_layers: int) -> bool:
    """True if each of the trained blocks has tensors of the same names and sizes, on whichever side of a cut."""
    of_block: list[set[tuple[Any, ...]]] = [set() for _ in range(num_layers)]
    # Of the server's tensors only adapters count: it has moments for those of its own blocks alone.
    server = {name: tensor for name, tensor in payload.server.items() if name.startswith("layers.")}
    for name, tensor in [*payload.tensors.items(), *server.items(), *payload.held.items()]:
        found = _OF_A_BLOCK.fullmatch(name)
        if found is not None:
            of_block[int(found["block"])].add((found["before"], found["rest"], tensor.shape))
    return all(block == of_block[0] for block in of_block)
