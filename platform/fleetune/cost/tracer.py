"""Records a step that runs on fake tensors: every operator's FLOPs and bytes, and when every piece of memory is held.

Fake tensors (torch's meta device) have shapes and no data. Tensors that follow from the data alone (token ids, labels, the
positions where the loss looks) stay real, so that code whose shapes depend on them runs as it is. Views move nothing, and what
an operator allocates inside itself is not seen.

A trace rests on these facts, each held by a test against real steps:

* On the meta device attention would take the path that keeps S x S scores, so it is sent to the kernel that the CPU takes.
* torch's flop counter does not know that kernel; `cost.operators` adds it.
* Saved-tensor hooks see all that the autograd graph holds.

torch's FakeTensorMode gives the same and takes ten times as long.
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
from fleetune.cost.operators import as_fake, cpu_attention, flop_formulas, moves_nothing, signature, tensors_in, traffic

WEIGHTS = "weights"
# Tensors received from the server. A device trains them in place, so they are not counted on top of the adapters made from them.
PAYLOAD = "payload"
ATTENTION = "scaled_dot_product_attention"
MAX_DERIVED = 20_000
"""Calls whose results are remembered: some hundred of each pair of model and batch."""
_derived: dict[tuple, tuple[list[tuple], int]] = {}
"""By call (`operators.signature`): (size, stride, dtype) of each output, and FLOPs. The same for all tracers of this process."""


@dataclass
class Op:
    """One operator that moves bytes."""

    name: str  # torch's, without namespace and overload
    flops: int
    bytes: tuple[int, ...]  # of each tensor that it reads or writes
    side: str  # client, server, or the simulation, whose work no device does
    step: int  # -1 before the first


@dataclass
class Held:
    """One piece of memory (a torch storage, which several tensors may share): what it is for, and when it is held."""

    num_bytes: int
    part: str  # `cost.trace.PARTS`, `PAYLOAD`, or the simulation's own
    since: dict[str, int] = field(
        default_factory=dict
    )  # side -> the operator that made it there, or first read it there
    until: int | None = None  # the first operator that runs without it; None: held to the end


class Tracer(TorchDispatchMode):
    """Records a call. Tensors whose last dimension is ``vocab_size`` are booked as logits."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.ops: list[Op] = []
        self.held: list[Held] = []
        self.clock = 0  # operators recorded so far
        # Step and block of every tick of the clock; blocks are numbered from 0 in the order in which they first run.
        self.places: list[tuple[int, int | None]] = []
        self.step = -1
        self.saved_bytes: list[int] = []  # of each piece that autograd keeps on the client in the first step
        self._pieces: dict[int, tuple[weakref.ref, Held]] = {}  # by the address of the storage
        self._flops = flop_formulas()
        self._saved: set[int] = set()  # ids of pieces that autograd keeps
        self._blocks: dict[int | None, int | None] = {None: None}  # a block's module, by id -> its number

    def given(self, tensors: Iterable[Tensor], part: str) -> None:
        """These tensors exist before the work begins. Only a side that reads them holds them (weights: from the start)."""
        for tensor in tensors:
            self._hold(tensor, part)

    def begin_step(self, step: int) -> None:
        """Called when the code asks for the examples of this step."""
        self.step = max(self.step, step)

    def only_held(self) -> None:
        """Called after work that ran no operator: from its one moment on, the client holds all that it was given.

        Nobody made an adapter of the payload, so what was sent of it is what there is.
        """
        assert not self.ops, "what was held is seen where operators read it"
        for held in self.held:
            held.since[scopes.CLIENT] = 0
            held.part = scopes.ADAPTERS if held.part == PAYLOAD else held.part
        self.ops.append(Op("hold", 0, (), scopes.SIMULATION, self.step))  # a moment, which costs nobody anything
        self.places.append((self.step, None))
        self.clock += 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would wrap every call of `__torch_dispatch__` to keep its compiler off, and nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if moves_nothing(func):
            out = func(*args, **(kwargs or {}))
            if not func.is_view:  # an allocation: memory, but no kernel
                self._hold_all(tensors_in(out))
            return out
        kwargs = kwargs or {}
        read = [t for value in (*args, *(v for k, v in kwargs.items() if k != "out")) for t in tensors_in(value)]
        inputs = [*read, *tensors_in(kwargs.get("out"))]
        name = func._overloadpacket.__name__
        if all(t.is_meta for t in inputs):
            out, flops = self._result(func, name, args, kwargs, inputs)
        elif any(t.is_meta for t in inputs):  # torch refuses to mix real and meta tensors
            out, flops = self._result(func, name, as_fake(args), as_fake(kwargs), inputs)
        else:
            out, flops = func(*args, **kwargs), 0  # follows from the data alone, and is cheap
        outputs = list(tensors_in(out))
        self._hold_all(inputs)
        self._hold_all(outputs)
        side = scopes.SIMULATION if scopes.current.part == scopes.SIMULATION else scopes.current.side
        self.ops.append(Op(name, flops, traffic(name, read, outputs), side, self.step))
        self.places.append((self.step, self._block()))
        self.clock += 1
        return out

    def _result(self, func: Any, name: str, args: tuple, kwargs: dict, inputs: list[Tensor]) -> tuple[Any, int]:
        """The operator's outputs, and its FLOPs.

        torch takes long to derive a meta output, and steps call the same operators with the same shapes over and over, so that
        outputs are made from what was derived before.
        """
        if name[-1] == "_" and not kwargs.get("out"):
            return inputs[0], 0  # in place: no operator that computes a product is
        formula = self._flops.get(func._overloadpacket)
        into = kwargs.get("out")
        if isinstance(into, Tensor):  # it has the result's shape already
            return into, int(formula(*args, **kwargs, out_val=into)) if formula else 0
        key = signature(func, args, kwargs)
        stored = _derived.get(key) if key else None
        if stored is not None:
            forms, flops = stored
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in forms]
            return (made[0] if len(made) == 1 else tuple(made)), flops
        out = func(*args, **kwargs)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        outputs = [out] if isinstance(out, Tensor) else list(tensors_in(out))
        # An output that is one of the inputs must stay that tensor: a new one would count its memory twice. An operator may also
        # leave out some of its outputs, such as the gradients of weights that there are none of.
        is_plain = isinstance(out, Tensor) or 1 < len(outputs) == len(out)
        if key and is_plain and all(t.is_meta for t in outputs) and not any(t is u for t in outputs for u in inputs):
            if len(_derived) >= MAX_DERIVED:
                _derived.clear()
            _derived[key] = [(t.shape, t.stride(), t.dtype) for t in outputs], flops
        return out, flops

    def _block(self) -> int | None:
        block = scopes.current.block
        if block not in self._blocks:
            self._blocks[block] = len(self._blocks) - 1
        return self._blocks[block]

    def _hold_all(self, tensors: Iterable[Tensor]) -> None:
        """The side at work holds these from now on, if it does not already."""
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
        """The piece of memory behind a tensor, booked under ``part`` if it is new."""
        storage = tensor.untyped_storage()
        found = self._pieces.get(storage._cdata)
        # The address of a freed storage is given to another one: it is the same piece only if its object is the same, too.
        if found is not None and found[0]() is storage:
            return found[1]
        held = Held(storage.nbytes(), part)

        def freed(_: object, held: Held = held) -> None:
            held.until = self.clock

        self._pieces[storage._cdata] = (weakref.ref(storage, freed), held)
        self.held.append(held)
        return held

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        """Called when autograd keeps a tensor. The block goes with it: the backward pass enters blocks in no other way."""
        held = self._hold(tensor, self._part(tensor))
        if id(held) not in self._saved and held.part not in (WEIGHTS, PAYLOAD, scopes.ADAPTERS):
            self._saved.add(id(held))
            if self.step == 0 and scopes.current.side == scopes.CLIENT:
                self.saved_bytes.append(held.num_bytes)
        if held.part == "workspace":
            held.part = "saved"
        return tensor, scopes.current.block

    @staticmethod
    def _unpack(packed: tuple[Tensor, int | None]) -> Tensor:
        """Called when the backward pass takes a tensor up: it is at work in that tensor's block from here on."""
        tensor, scopes.current.block = packed
        return tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record what runs inside.

        Python's collector of cycles waits until the end: it would run at arbitrary operators, and no two recordings of the same
        work would free their memory at the same ones.
        """
        # PyTorch imports this when an operator needs it first. If that happened inside, frames of the import would hold tensors
        # in cycles, and the first recording of a process would need more memory than all that follow.
        import torch._dynamo

        collected, attention = gc.isenabled(), getattr(nn.functional, ATTENTION)
        gc.disable()
        scopes.current.block = None
        # Patched here and not in `_Front`, which is off while blocks are computed again inside a backward pass.
        setattr(nn.functional, ATTENTION, cpu_attention)
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
        """Book a tensor as a gradient: when autograd made it, it looked like any temporary."""
        held = self._hold(tensor, scopes.GRADIENTS)
        held.part = scopes.GRADIENTS


class _Front(TorchFunctionMode):
    """Sees calls of torch before they become operators: gradients that are read, and numbers that leave torch."""

    def __init__(self, found_gradient: Callable[[Tensor], None]):
        super().__init__()
        self.found_gradient = found_gradient

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if (
            func in _CONSTRUCTORS and kwargs.get("device") is None
        ):  # torch.zeros and the like: fake, unless they name a device
            kwargs = {**kwargs, "device": "meta"}
        if func in (Tensor.to, Tensor.cpu) and args[0].is_meta:  # a fake tensor stays where it is
            args = tuple(arg for arg in args if not isinstance(arg, (torch.device, str)))
            if len(args) == 1:
                return args[0]
        if func in (Tensor.numpy, Tensor.tolist) and args[0].is_meta:  # a loss, say: any number serves, costs ignore it
            zeros = np.zeros(args[0].shape, np.float32)
            return zeros if func is Tensor.numpy else zeros.tolist()
        out = func(*args, **kwargs)
        if func == _GRAD and out is not None:  # the only way to get hold of a gradient is to read a leaf's .grad
            self.found_gradient(out)
        return out


_CONSTRUCTORS = frozenset(_device_constructors())
_GRAD: Any = vars(torch._C.TensorBase)["grad"].__get__
