"""Named tensors, the value that methods pass around: sums, norms, bytes, and one flat buffer for the wire.

A ``Tensors`` maps a name such as ``layers.3.self_attn.q_proj.lora_A`` to a tensor. Over a link or through the object
store it travels as one contiguous buffer (`pack`), so that an adapter of 200 small tensors costs one copy, not 200.
"""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleetune import files

Tensors = dict[str, Tensor]

# Buffers of at least this size get a memory mapping of their own, so that freeing one returns it to the system. On the heap they
# would leave holes that workers never give back: 170 MiB on two workers after 100 replies of 4.5 MB.
LARGE_BYTES = 1 << 20

ALIGNMENT = 16
"""Bytes: every tensor in a packed buffer begins at a multiple of it."""

# Buffers mapped from the object store are read-only; nobody here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes that these tensors take on a link."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def select(tensors: Mapping[str, Tensor], keep: Callable[[str], bool]) -> Tensors:
    """The tensors whose name satisfies ``keep``, in their order."""
    return {name: t for name, t in tensors.items() if keep(name)}


def weighted_sum(items: Iterable[tuple[float, Mapping[str, Tensor]]]) -> Tensors:
    """sum_k w_k u_k over (w_k, u_k), in their order: direct form, so that one client of weight 1 comes out bit for bit."""
    total: Tensors = {}
    for weight, tensors in items:
        add_weighted(total, tensors, weight)
    return total


def add_weighted(total: Tensors, tensors: Mapping[str, Tensor], weight: float) -> None:
    """total += weight * tensors, in place; names that are not there yet are added."""
    for name, tensor in tensors.items():
        if name in total:
            total[name].add_(tensor, alpha=weight)
        else:
            total[name] = tensor * weight


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """True if both hold the same names and equal values."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def finite_rows(rows: Tensor) -> np.ndarray:
    """True for each row of ``(K, P)`` in which all numbers are finite, bool ``(K,)``.

    One sum per row is enough if it is finite, as any NaN or infinity would spoil it. A sum that is not finite may only have
    overflowed, so those rows are looked at number by number.
    """
    out = rows.sum(dim=1).isfinite().numpy()
    for k in np.flatnonzero(~out):
        out[k] = bool(rows[k].isfinite().all())
    return out


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if all numbers in these tensors are finite."""
    flat = [tensor.reshape(-1) for tensor in tensors]  # in one sum: a call for each would cost ten times as much
    return not flat or bool(finite_rows(torch.cat(flat)[None])[0])


@dataclass(frozen=True)
class Packed:
    """Tensors as one buffer, which pickles without a copy."""

    layout: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(name, dtype, shape) of every tensor, in the buffer's order."""
    data: np.ndarray
    """(bytes,) uint8: the tensors one after the other."""
    alignment: int = ALIGNMENT
    """Every tensor starts at a multiple of this many bytes; what lies between them has no meaning."""

    def unpack(self) -> Tensors:
        """Views into the buffer. They must not be written to if it is read-only (mapped from the object store)."""
        buffer = torch.from_numpy(self.data)
        out: Tensors = {}
        start = 0
        for name, dtype, shape in self.layout:
            torch_dtype = getattr(torch, dtype)
            size = math.prod(shape) * torch_dtype.itemsize
            out[name] = buffer[start : start + size].view(torch_dtype).view(shape)
            start += _padded(size, self.alignment)
        return out


def _buffer(num_bytes: int) -> np.ndarray:
    """A writable buffer, (num_bytes,) uint8, with a mapping of its own if it is large (LARGE_BYTES)."""
    if num_bytes < LARGE_BYTES:
        return np.empty(num_bytes, np.uint8)
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


def _empty(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Like `_buffer`, as a flat tensor (num_elements,). A small one comes from PyTorch, where cost traces see it."""
    size = num_elements * dtype.itemsize
    if size < LARGE_BYTES:
        return torch.empty(num_elements, dtype=dtype)
    return torch.from_numpy(_buffer(size)).view(dtype)


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Copy the tensors into one buffer, each on a 16-byte boundary."""
    layout = tuple((n, _dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items())
    sizes = [t.numel() * t.element_size() for t in tensors.values()]
    data = _buffer(sum(_padded(size, ALIGNMENT) for size in sizes))
    buffer = torch.from_numpy(data)
    start = 0
    for tensor, size in zip(tensors.values(), sizes, strict=True):
        buffer[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += _padded(size, ALIGNMENT)
    return Packed(layout, data)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Stack:
    """The tensors of K clients as one buffer ``data (K, P)``: row k is client k, ``views()[name]`` is ``(K, *shape)``.

    P is the number of elements of one client. Sums and optimizer steps run over the buffer, not over its hundreds of tensors.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], data: Tensor):
        self.shapes = dict(shapes)
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.data = data

    @classmethod
    def of(cls, clients: list[Tensors]) -> Stack:
        """Stack the tensors of several clients, which have the same names, shapes and dtype."""
        first = clients[0]
        width = sum(t.numel() for t in first.values())
        dtype = next(iter(first.values())).dtype if first else torch.float32
        size = len(clients) * width
        is_traced = any(t.is_meta for t in first.values())
        data = torch.empty(size, dtype=dtype, device="meta") if is_traced else _empty(size, dtype)
        data = data.view(len(clients), width)
        stack = cls({name: tuple(t.shape) for name, t in first.items()}, data)
        for name, view in stack.views().items():
            for k, tensors in enumerate(clients):
                view[k].copy_(tensors[name])
        return stack

    def __len__(self) -> int:
        return self.data.shape[0]

    def to(self, device: torch.device | str) -> Stack:
        """The stack on a device: this one if it is there already."""
        return self if self.data.device == torch.device(device) else Stack(self.shapes, self.data.to(device))

    def views(self, data: Tensor | None = None) -> Tensors:
        """name -> (K, *shape): views into the buffer, or into ``data (n, P)`` such as its gradient or some of its rows."""
        data = self.data if data is None else data
        parts = zip(self.shapes.items(), data.split(self.sizes, dim=1), strict=True)
        return {name: part.view(-1, *shape) for (name, shape), part in parts} if self.sizes else {}

    def client(self, k: int) -> Tensors:
        """The tensors of client k, views into the buffer."""
        return {name: view[0] for name, view in self.views(self.data[k : k + 1]).items()}

    def rows(self, clients: list[int]) -> Stack:
        """The rows of some clients, in the order given (a copy)."""
        return Stack(self.shapes, self.data[clients])

    def columns(self, keep: Callable[[str], bool]) -> Stack:
        """The tensors whose names satisfy ``keep``: a copy, or this stack if that is all of them."""
        names = [name for name in self.shapes if keep(name)]
        if len(names) == len(self.shapes):
            return self
        views = self.views()
        parts = [views[name].reshape(len(self), -1) for name in names]
        data = torch.cat(parts, dim=1) if parts else self.data.new_empty(len(self), 0)
        return Stack({name: self.shapes[name] for name in names}, data)

    def weighted_sum(self, weights: Iterable[float]) -> Tensors:
        """sum_k w_k u_k in row order, as named tensors; one row of weight 1 comes out bit for bit."""
        total = RunningSum()
        total.add(self, weights)
        return total.tensors()


class RunningSum:
    """A weighted sum over the rows of stacks, in their order.

    It is one flat row (P,) per form of stack, so that adding a client is one operation and not one per tensor.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple, Tensor] = {}  # names and shapes of a stack -> sum (P,)

    def __bool__(self) -> bool:
        """True if anything was added."""
        return bool(self._rows)

    def add(self, stack: Stack, weights: Iterable[float]) -> None:
        """Add sum_k w_k u_k, row by row: one product over all K rows would sum in an order that depends on K."""
        form = tuple(stack.shapes.items())
        for row, weight in zip(stack.data, weights, strict=True):
            if form in self._rows:
                self._rows[form].add_(row, alpha=weight)
            else:
                self._rows[form] = torch.mul(row, weight, out=_empty(row.numel(), row.dtype))

    def tensors(self) -> Tensors:
        """The sum as named tensors: views into it if all stacks had the same names and shapes."""
        sums = [Stack(dict(form), row[None]).client(0) for form, row in self._rows.items()]
        return sums[0] if len(sums) == 1 else weighted_sum((1.0, tensors) for tensors in sums)

    def packed(self) -> Packed:
        """The sum for the wire: the row itself if all stacks had the same names and shapes, as a copy would double the memory."""
        if len(self._rows) != 1:
            return pack(self.tensors())
        ((form, row),) = self._rows.items()
        layout = tuple((name, _dtype_name(row.dtype), shape) for name, shape in form)
        return Packed(layout, row.view(torch.uint8).numpy(), alignment=row.element_size())


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None, *, lasting: bool = False
) -> None:
    """Write a sealed safetensors file in one step: afterwards it is complete, or not there at all (`files.write`).

    safetensors sorts the names, so their order is stored beside them: sums over all tensors go in that order.
    """
    files.write(path, to_bytes(tensors, metadata), lasting=lasting)


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> bytes:
    """The bytes of a file for `load`, with room for its checksum."""
    from safetensors.torch import save as serialized

    header = json.dumps({"checksum": files.BLANK, "names": list(tensors), "metadata": dict(metadata or {})})
    copies = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    return serialized(copies, metadata={"fleetune": header})  # one entry: safetensors writes several in any order


def load(path: Path, *, holds: str = "its tensors") -> tuple[Tensors, dict]:
    """The tensors and the metadata of a file that `save` wrote.

    Raises `files.Damaged` if it is damaged and FileNotFoundError if it is missing. ``holds`` says in the message what is lost.
    """
    from safetensors import safe_open

    files.read(path, holds=holds, must_be_sealed=True)
    with files.parsing(path, holds=holds), safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fleetune"])
        return {name: file.get_tensor(name) for name in header["names"]}, header["metadata"]


def load_header(file: Any) -> dict:
    """The metadata in an open file that `save` wrote."""
    return json.loads(file.metadata()["fleetune"])["metadata"]
