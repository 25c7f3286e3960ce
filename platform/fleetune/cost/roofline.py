"""Seconds of a traced step on a device: every operator by its own roofline.

An operator takes ``max(FLOPs / rate, bytes / bandwidth)`` and its launch (Williams, Waterman and Patterson 2009,
doi:10.1145/1498765.1498785). Bytes are those of its distinct inputs and outputs, as in eager execution without a cache
between operators; fused kernels move less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fleetune.cost.polynomials import evaluate
from fleetune.cost.trace import SideWork
from fleetune.fleet.profile import DeviceProfile


def seconds_of(
    work: SideWork, basis: np.ndarray, precision: str, devices: Sequence[DeviceProfile], device_index: np.ndarray
) -> np.ndarray:
    """Seconds of one step for n clients: their batches ``basis (n, 6)``, their devices by index, (n,)."""
    rate = np.array([profile.sustained_flops(precision) for profile in devices])[device_index]
    bandwidth = np.array([profile.sustained_bytes_per_second for profile in devices])[device_index]
    launch = np.array([profile.launch_seconds for profile in devices])[device_index]
    seconds = evaluate(work.moved, basis) / bandwidth + work.num_ops * launch
    for (flops, moved), count in zip(work.products, work.counts, strict=True):
        seconds += count * np.maximum(evaluate(flops, basis) / rate, evaluate(moved, basis) / bandwidth)
    return seconds
