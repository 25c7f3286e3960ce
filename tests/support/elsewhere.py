"""A pretend device: tensors that live in this machine's memory and say that they do not.

Whatever is worked out from them stays there, and an operation that mixes them with a tensor of the CPU raises, as a GPU's
would. So a run on this device shows whether everything is moved there and back, without a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
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
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [isinstance(t, There) for t in tensors]
    asked = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    goes_there = any(device.type == NAME for device in asked) if asked else any(there)
    if name not in ("_to_copy", "copy_", "index.Tensor") and any(there):
        stray = [t for t in tensors if not isinstance(t, There) and t.ndim > 0]
        assert not stray, f"{name}: a tensor {tuple(stray[0].shape)} lies on the CPU, others on {NAME}"
    here = {torch.device: lambda _: torch.device("cpu"), There: lambda tensor: tensor.inner}
    out = func(*_replaced(here, args), **_replaced(here, kwargs))
    if name == "_local_scalar_dense" or not goes_there:
        return out
    written = {
        id(t.inner): t for t in tensors if isinstance(t, There)
    }  # what is changed in place stays the same object
    return tree_map_only(torch.Tensor, lambda t: written[id(t)] if id(t) in written else There(t), out)


def _replaced(kinds: dict[type, Any], tree: Any) -> Any:
    for kind, replacement in kinds.items():
        tree = tree_map_only(kind, replacement, tree)
    return tree
