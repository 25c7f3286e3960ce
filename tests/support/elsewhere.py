"""A pretend device: tensors that live in this machine's memory and say that they do not.

Whatever is worked out from them stays there, and an operation that mixes them with a tensor of the CPU raises, as a GPU's
would. So a run on this device shows whether everything is moved there and back, without a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"


@functools.cache
def register() -> None:
    """Make PyTorch know the device's name, once per process."""
    _setup_privateuseone_for_python_backend(NAME)


class There(torch.Tensor):
    """A tensor of the pretend device, around the one that holds its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        # A wrapper made in inference mode could not be a view of one that was made outside, as a real device's tensors can.
        with torch.inference_mode(mode=False):
            return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=f"{NAME}:0"
            )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def tolist(self) -> Any:
        """PyTorch refuses it to subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While it lasts, the device can be asked for."""

    def __enter__(self) -> Elsewhere:
        register()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Work an operation out where its tensors are."""
    name = func._schema.name.removeprefix("aten::")
    tensors: list[torch.Tensor] = []
    asked: list[torch.device] = []
    here_args, here_kwargs = _here(args, tensors, asked), _here(kwargs, tensors, asked)
    there = [t for t in tensors if isinstance(t, There)]
    goes_there = any(device.type == NAME for device in asked) if asked else bool(there)
    if there and name not in ("_to_copy", "copy_", "index.Tensor"):
        stray = [t for t in tensors if not isinstance(t, There) and t.ndim > 0]
        assert not stray, f"{name}: a tensor {tuple(stray[0].shape)} lies on the CPU, others on {NAME}"
    out = func(*here_args, **here_kwargs)
    if name == "_local_scalar_dense" or not goes_there:
        return out
    return _there(out, {id(t.inner): t for t in there})  # what is changed in place stays the same object


CPU = torch.device("cpu")


def _here(value: Any, tensors: list[torch.Tensor], asked: list[torch.device]) -> Any:
    """Arguments for the CPU; the tensors and devices among them are noted. PyTorch's own walks took half of a run's time."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.inner if isinstance(value, There) else value
    if isinstance(value, (list, tuple)):
        return type(value)([_here(part, tensors, asked) for part in value])
    if isinstance(value, dict):
        return {name: _here(part, tensors, asked) for name, part in value.items()}
    if isinstance(value, torch.device):
        asked.append(value)
        return CPU
    return value


def _there(value: Any, written: dict[int, There]) -> Any:
    """Results on the device."""
    if isinstance(value, torch.Tensor):
        return written[id(value)] if id(value) in written else There(value)
    return type(value)([_there(part, written) for part in value]) if isinstance(value, (list, tuple)) else value
