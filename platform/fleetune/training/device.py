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
    """Make a GPU add in the same order each time, as the CPU does, and refuse operations that cannot.

    Attention's gradient and sums by index would otherwise add in the order in which threads happen to finish. ``kernels``:
    ``compiled`` or ``torch``. Raises UserError if kernels cannot be compiled here.
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
    """True if this machine can compile the kernels, or has done so before."""
    try:
        load(_kernels_dir())
    except KernelsUnavailable as error:
        log.info("kernels are PyTorch's: %s", error)
        return False
    return True


def _kernels_dir() -> Path:
    return default_cache_dir() / "kernels"


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device. To a GPU it goes through pinned memory, so that the GPU's work goes on meanwhile."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
