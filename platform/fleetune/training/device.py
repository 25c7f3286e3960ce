"""The processor that a worker process computes on: how it is set up, and how batches get there."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor


def set_up(device: str) -> None:
    """Make sums on a GPU come out in one order each time, as they do on the CPU, and refuse what cannot.

    Attention's gradient and sums by index would otherwise add in the order in which threads happen to finish.
    """
    if device == "cuda":
        # cuBLAS is deterministic only with a workspace of fixed size: docs.nvidia.com/cuda/cublas, "Results reproducibility".
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing is read here before it is written
    torch.use_deterministic_algorithms(device == "cuda")


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor there. To a GPU it goes through pinned memory, beside what the GPU is doing."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
