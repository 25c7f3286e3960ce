"""Watches a step run on fake tensors: every operator's FLOPs and bytes, and when every piece of memory is held.

Fake tensors (torch's meta device) have shapes and no data. What is derived from the data alone (token ids, labels, where the
loss looks) stays real, so that code whose shapes depend on it runs as it is. Views move nothing; temporaries inside an
operator are unseen.

Facts that this rests on, each held by a test against real steps: on the meta device attention would take the path that keeps
S x S scores, so it is sent to the kernel that the CPU takes; torch's flop counter does not know that kernel; what the autograd
graph holds is told by saved-tensor hooks. (FakeTensorMode gives the same and takes ten times as long.)
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from fleetune import scopes

WEIGHTS = "weights"
PAYLOAD = (
    "payload"  # what was received: a device trains it where it lies, so that it counts as the adapters laid out from it
)
ATTENTION = "scaled_dot_product_attention"
NO_TRAFFIC = {"_unsafe_view", "detach", "alias", "_reshape_alias", "lift_fresh", "empty", "empty_like", "new_empty"}
NO_TRAFFIC |= {"empty_strided", "new_empty_strided"}
GATHERS = {"embedding", "index_select", "index"}  # read only the rows that they give
OVERWRITES = {"copy_", "fill_", "zero_"}  # do not read what they replace


@dataclass
class Op:
    """One operator that moves bytes."""

    name: str
    flops: int
    bytes: tuple[int, ...]
    """Of each input and output."""
    side: str
    step: int


@dataclass
class Held:
    """One piece of memory: its bytes, what it is for, and from which operator to which it is there."""

    num_bytes: int
    part: str
    since: dict[str, int] = field(default_factory=dict)
    """Side -> the operator that made it there, or read it there for the first time."""
    until: int | None = None
    """The first operator that runs without it; None: there to the end."""


class Tracer(TorchDispatchMode):
    """Records a call. ``vocab_size``: the width by which logits are known."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.ops: list[Op] = []
        self.held: list[Held] = []
        self.clock = 0
        self.places: list[tuple[int, int | None]] = []
        """Step and block of every tick of the clock; blocks are counted as they run for the first time."""
        self.step = -1
        self.saved_bytes: list[int] = []
        self._known: dict[int, tuple[weakref.ref, Held]] = {}
        self._flops = _flop_formulas()
        self._kept: set[int] = set()
        self._blocks: dict[int | None, int | None] = {None: None}
        self._made: dict[tuple, tuple[list[tuple], int]] = {}

    def given(self, tensors: Iterable[Tensor], part: str) -> None:
        """These were there before the work began; who reads them holds them from the start."""
        for tensor in tensors:
            self._hold(tensor, part)

    def begin_step(self, step: int) -> None:
        """The code has asked for the examples of this step."""
        self.step = max(self.step, step)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in _moves_nothing:
            _moves_nothing[func] = func.is_view or func._overloadpacket.__name__ in NO_TRAFFIC
        if _moves_nothing[func]:
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                self._hold_all(_tensors(out))
            return out
        kwargs = kwargs or {}
        read = [t for value in (*args, *(v for k, v in kwargs.items() if k != "out")) for t in _tensors(value)]
        inputs = [*read, *_tensors(kwargs.get("out"))]
        name = func._overloadpacket.__name__
        if all(t.is_meta for t in inputs):
            out, flops = self._worked_out(func, name, args, kwargs, inputs)
        elif any(t.is_meta for t in inputs):
            out, flops = self._worked_out(func, name, _as_fake(args), _as_fake(kwargs), inputs)
        else:
            out, flops = func(*args, **kwargs), 0  # follows from the data alone
        outputs = list(_tensors(out))
        self._hold_all(inputs)
        self._hold_all(outputs)
        side = scopes.SIMULATION if scopes.current.part == scopes.SIMULATION else scopes.current.side
        self.ops.append(Op(name, flops, _traffic(name, read, outputs), side, self.step))
        self.places.append((self.step, self._block()))
        self.clock += 1
        return out

    def _worked_out(self, func: Any, name: str, args: tuple, kwargs: dict, inputs: list[Tensor]) -> tuple[Any, int]:
        """The result's shapes, and the FLOPs; what was asked before is not worked out again."""
        if name[-1] == "_" and not kwargs.get("out"):
            return inputs[0], 0  # in place: no operator that computes a product is
        formula = self._flops.get(func._overloadpacket)
        into = kwargs.get("out")
        if isinstance(into, Tensor):  # it has the result's shape already
            return into, int(formula(*args, **kwargs, out_val=into)) if formula else 0
        key = _signature(func, args, kwargs)
        known = self._made.get(key) if key else None
        if known is not None:
            forms, flops = known
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in forms]
            return (made[0] if len(made) == 1 else tuple(made)), flops
        out = func(*args, **kwargs)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        outputs = [out] if isinstance(out, Tensor) else list(_tensors(out))
        if key and outputs and all(t.is_meta for t in outputs) and not any(t is u for t in outputs for u in inputs):
            self._made[key] = [(t.shape, t.stride(), t.dtype) for t in outputs], flops
        return out, flops

    def _block(self) -> int | None:
        block = scopes.current.block
        if block not in self._blocks:
            self._blocks[block] = len(self._blocks) - 1
        return self._blocks[block]

    def _hold_all(self, tensors: Iterable[Tensor]) -> None:
        """The side at work holds these from now on, or has done so already."""
        side = scopes.current.side
        for tensor in tensors:
            held = self._hold(tensor, self._part(tensor))
            if side not in held.since:
                held.since[side] = 0 if held.part == WEIGHTS else self.clock

    def _part(self, tensor: Tensor) -> str:
        if scopes.current.part is not None:
            return scopes.current.part
        return "logits" if tensor.shape[-1:] == (self.vocab_size,) else "workspace"

    def _hold(self, tensor: Tensor, part: str) -> Held:
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None and known[0]() is storage:
            return known[1]
        held = Held(storage.nbytes(), part)

        def freed(_: object, held: Held = held) -> None:
            held.until = self.clock

        self._known[storage._cdata] = (weakref.ref(storage, freed), held)
        self.held.append(held)
        return held

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        held = self._hold(tensor, self._part(tensor))
        if id(held) not in self._kept and held.part not in (WEIGHTS, PAYLOAD, scopes.ADAPTERS):
            self._kept.add(id(held))
            if self.step == 0 and scopes.current.side == scopes.CLIENT:
                self.saved_bytes.append(held.num_bytes)
        if held.part == "workspace":
            held.part = "saved"
        return tensor, scopes.current.block

    @staticmethod
    def _unpack(packed: tuple[Tensor, int | None]) -> Tensor:
        """Called where the backward pass comes to what a block has saved."""
        tensor, scopes.current.block = packed
        return tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch what runs inside; collection of cycles waits, so that memory is held as long as the code holds it."""
        collected, attention = gc.isenabled(), getattr(nn.functional, ATTENTION)
        gc.disable()
        scopes.current.block = None
        # Not in the mode below, which is off while blocks are computed again inside a backward pass.
        setattr(nn.functional, ATTENTION, _cpu_attention)
        try:
            with (
                torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack),
                _Front(self._gradient),
                self,
            ):
                yield
        finally:
            setattr(nn.functional, ATTENTION, attention)
            if collected:
                gc.enable()

    def _gradient(self, tensor: Tensor) -> None:
        held = self._hold(tensor, scopes.GRADIENTS)
        held.part = scopes.GRADIENTS


class _Front(TorchFunctionMode):
    """What is seen before it becomes operators: gradients that are read, and numbers that leave torch."""

    def __init__(self, found_gradient: Callable[[Tensor], None]):
        super().__init__()
        self.found_gradient = found_gradient

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONSTRUCTORS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if func in (Tensor.to, Tensor.cpu) and args[0].is_meta:  # it lies where it is wanted
            args = tuple(arg for arg in args if not isinstance(arg, (torch.device, str)))
            if len(args) == 1:
                return args[0]
        if func in (Tensor.numpy, Tensor.tolist) and args[0].is_meta:
            zeros = np.zeros(args[0].shape, np.float32)
            return zeros if func is Tensor.numpy else zeros.tolist()
        out = func(*args, **kwargs)
        if func == _GRAD and out is not None:  # whoever reads a leaf's .grad has a gradient in hand
            self.found_gradient(out)
        return out


_CONSTRUCTORS = frozenset(_device_constructors())
_moves_nothing: dict[Any, bool] = {}
_GRAD: Any = vars(torch._C.TensorBase)["grad"].__get__


def _cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel that the CPU takes for these arguments; heads that share keys and values are known by their sizes."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _signature(func: Any, args: tuple, kwargs: dict) -> tuple | None:
    """What decides an operator's result: its arguments, tensors by shape. None where an argument is not hashable."""
    if "out" in kwargs:
        return None
    parts = tuple(_described(value) for value in (*args, *kwargs.values()))
    try:
        hash(parts)
    except TypeError:
        return None
    return func, parts, tuple(kwargs)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(_described(part) for part in value) if isinstance(value, (list, tuple)) else value


def _as_fake(values: Any) -> Any:
    """Real tensors by their shapes alone."""
    if isinstance(values, Tensor):
        return (
            values
            if values.is_meta
            else torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        )
    if isinstance(values, (tuple, list)):
        return type(values)(_as_fake(value) for value in values)
    return {name: _as_fake(value) for name, value in values.items()} if isinstance(values, dict) else values


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _traffic(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, ...]:
    """Bytes that an operator reads and writes, tensor by tensor: each distinct input once, each output once."""
    if name in GATHERS:
        return tuple(2 * _size(t) for t in outputs)
    if name in OVERWRITES:
        inputs = inputs[1:]
    distinct = {id(t): t for t in inputs}
    return tuple(_size(t) for t in (*distinct.values(), *outputs))


def _flop_formulas() -> dict[Any, Callable]:
    """torch's own formulas by operator, and the CPU's flash attention by the same."""
    from torch.utils import flop_counter
    from torch.utils._pytree import tree_map

    def of_shapes(formula: Callable) -> Callable:
        def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            args, kwargs = tree_map(flop_counter.get_shape, (args, kwargs))
            return formula(*args, **kwargs)

        return counted

    aten = torch.ops.aten
    return {
        **flop_counter.flop_registry,
        aten._scaled_dot_product_flash_attention_for_cpu: of_shapes(
            lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: of_shapes(
            lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
