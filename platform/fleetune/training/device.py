"""The processor that a worker process computes on: how it is set up, and how batches get there."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fleetune.errors import UserError
from fleetune.files import default_cache_dir
from fleetune.models.kernels import KernelsUnavailable, load, use

log = logging.getLogger(__name__)


def set_up(device: str, kernels: str = "torch") -> None:
    """Make sums on a GPU come out in one order each time, as they do on the CPU, and refuse what cannot.

    Attention's gradient and sums by index would otherwise add in the order in which threads happen to finish. ``kernels``:
    ``compiled`` or ``torch``; UserError where they cannot be compiled here.
    """
    if device == "cuda":
        # cuBLAS is deterministic only with a workspace of fixed size: docs.nvidia.com/cuda/cublas, "Results reproducibility".
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing is read here before it is written
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        use(_kernels_dir() if kernels == "compiled" else None)
    except KernelsUnavailable as error:
        raise UserError(
            f"on node {platform.node()}: {error}",
            field="execution.kernels",
            value=kernels,
            hint="install a C compiler there, or set execution.kernels=torch",
        ) from error


def can_compile() -> bool:
    """Whether this machine compiles kernels, or has done so before."""
    try:
        load(_kernels_dir())
    except KernelsUnavailable as error:
        log.info("kernels are PyTorch's: %s", error)
        return False
    return True


def _kernels_dir() -> Path:
    return default_cache_dir() / "kernels"


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor there. To a GPU it goes through pinned memory, beside what the GPU is doing."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
