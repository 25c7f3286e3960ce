"""The costs of local work on a fleet's devices: FLOPs, memory, seconds, joules; one entry per client.

Time is a roofline: ``max(FLOPs / (peak · sustained), bytes / (bandwidth · sustained)) + kernels · launch``
per step, then the link's latency and rate each way. Energy is idle power over the round, what computing adds,
and the radio. Everything is an array over clients; a kind of client is worked out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from fleetune.cost.flops import StepFlops, client_flops, server_flops
from fleetune.cost.memory import MemoryNeed, memory_need
from fleetune.cost.roofline import step_traffic
from fleetune.cost.work import LocalWork
from fleetune.fleet.devices import device
from fleetune.fleet.networks import RadioEnergy
from fleetune.fleet.profile import DeviceProfile


@dataclass(frozen=True)
class CostTable:
    """Costs of one round, one entry per client; seconds are virtual."""

    flops: np.ndarray
    server_flops: np.ndarray
    peak_memory_bytes: np.ndarray
    weights_bytes: np.ndarray
    adapter_bytes: np.ndarray
    gradient_bytes: np.ndarray
    optimizer_bytes: np.ndarray
    activation_bytes: np.ndarray
    budget_bytes: np.ndarray
    compute_seconds: np.ndarray
    server_seconds: np.ndarray
    downlink_seconds: np.ndarray
    uplink_seconds: np.ndarray
    sim_seconds: np.ndarray
    energy_joules: np.ndarray
    over_budget: np.ndarray  # bool: peak_memory_bytes > budget_bytes

    def __len__(self) -> int:
        return len(self.flops)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def row(self, client: int) -> dict[str, float | bool]:
        """The costs of one client, as plain values."""
        return {name: column[client].item() for name, column in self.columns().items()}


def estimate(
    work: LocalWork,
    *,
    devices: Sequence[DeviceProfile],
    device_index: np.ndarray,  # (n,) into devices
    num_steps: ArrayLike,  # (n,) local steps
    mean_tokens: ArrayLike,  # (n,) tokens per example after padding: counts for time
    max_tokens: ArrayLike,  # (n,) the longest example: counts for memory
    downlink_bytes: ArrayLike,  # (n,)
    uplink_bytes: ArrayLike,  # (n,)
    down_bps: ArrayLike,  # (n,) bits per second
    up_bps: ArrayLike,  # (n,)
    latency_seconds: ArrayLike,  # (n,) one way
    num_messages: ArrayLike = 1,  # each way
    logit_fraction: ArrayLike = 1.0,  # of the positions, those where logits are computed
    radio: RadioEnergy | None = None,
    server: DeviceProfile | None = None,  # of split learning; default server-a100
) -> CostTable:
    """What `work` costs each of n clients. All clients share the work; scalars stand for n equal entries."""
    index = np.asarray(device_index)
    steps, tokens, longest, fraction, num_msgs, latency = (
        np.broadcast_to(np.asarray(values, float), index.shape)
        for values in (num_steps, mean_tokens, max_tokens, logit_fraction, num_messages, latency_seconds)
    )

    flops = _flops(client_flops(work), work, tokens, fraction)
    compute_seconds = steps * _step_seconds(work, flops, tokens, fraction, devices, index)
    server_work, server_seconds = _server(work, tokens, fraction, server)

    need = memory_need(work)
    activation = activation_bytes(need, longest, fraction, batch_size=work.batch_size)
    resident = need.weights_bytes + need.adapter_bytes + need.optimizer_bytes
    # Two moments can be the peak: the start of backward, and the optimizer's step (gradients, and one more
    # copy of the trainable tensors in torch's foreach implementation).
    peak = resident + np.maximum(activation, 2 * need.gradient_bytes)
    budget = _per_device("budget_bytes", devices, index)

    downlink_seconds = _link_seconds(downlink_bytes, down_bps, latency, num_msgs)
    uplink_seconds = _link_seconds(uplink_bytes, up_bps, latency, num_msgs)
    sim_seconds = downlink_seconds + compute_seconds + steps * server_seconds + uplink_seconds

    idle = _per_device("idle_watts", devices, index)
    energy = idle * sim_seconds + (_per_device("active_watts", devices, index) - idle) * compute_seconds
    if radio is not None:
        energy = energy + radio.joules(downlink_bytes, uplink_bytes, downlink_seconds + uplink_seconds)

    def constant(value: float) -> np.ndarray:
        return np.full(index.shape, float(value))

    return CostTable(
        flops=steps * flops,
        server_flops=steps * server_work,
        peak_memory_bytes=peak,
        weights_bytes=constant(need.weights_bytes),
        adapter_bytes=constant(need.adapter_bytes),
        gradient_bytes=constant(need.gradient_bytes),
        optimizer_bytes=constant(need.optimizer_bytes),
        activation_bytes=activation,
        budget_bytes=budget,
        compute_seconds=compute_seconds,
        server_seconds=steps * server_seconds,
        downlink_seconds=downlink_seconds,
        uplink_seconds=uplink_seconds,
        sim_seconds=sim_seconds,
        energy_joules=energy,
        over_budget=peak > budget,
    )


def activation_bytes(
    need: MemoryNeed, tokens: np.ndarray, logit_fraction: np.ndarray, *, batch_size: int
) -> np.ndarray:
    """Activations and temporaries at the peak, for examples padded to ``tokens``."""
    batch = batch_size * tokens
    block = need.block_per_token + need.outputs_per_token * logit_fraction
    at_logits = batch * need.logits_per_token * logit_fraction
    at_product = batch * need.dequantised_per_token + need.dequantised_bytes
    transient = np.maximum(np.maximum(at_logits, batch * block), at_product)
    return batch * (need.kept_per_token + need.kept_per_token_pair * tokens) + transient


def _flops(step: StepFlops, work: LocalWork, tokens: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    per_token = step.per_token + step.per_token_pair * tokens + step.per_logit * fraction
    return work.batch_size * tokens * per_token


def _step_seconds(
    work: LocalWork,
    flops: np.ndarray,
    tokens: np.ndarray,
    fraction: np.ndarray,
    devices: Sequence[DeviceProfile],
    index: np.ndarray,
) -> np.ndarray:
    traffic = step_traffic(work)
    moved = traffic.fixed_bytes + work.batch_size * tokens * (traffic.per_token + traffic.per_logit * fraction)
    rate = np.array([profile.sustained_flops(work.precision) for profile in devices])[index]
    bandwidth = _per_device("sustained_bytes_per_second", devices, index)
    dequantising = traffic.dequantised_bytes / bandwidth  # kernels of their own: not hidden behind the products
    launch = _per_device("launch_seconds", devices, index)
    return np.maximum(flops / rate, moved / bandwidth) + dequantising + traffic.num_ops * launch


def _server(
    work: LocalWork, tokens: np.ndarray, fraction: np.ndarray, server: DeviceProfile | None
) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs and seconds per step that the server of split learning spends on one client."""
    if work.split is None:
        return np.zeros(tokens.shape), np.zeros(tokens.shape)
    flops = _flops(server_flops(work), work, tokens, fraction)
    return flops, flops / (server or device("server-a100")).sustained_flops(work.precision)


def _link_seconds(
    num_bytes: ArrayLike, bits_per_second: ArrayLike, latency: np.ndarray, num_messages: np.ndarray
) -> np.ndarray:
    """Latency of the messages and time on the wire; nothing to send takes no time."""
    payload = np.broadcast_to(np.asarray(num_bytes, float), latency.shape)
    seconds = latency * num_messages + 8 * payload / np.asarray(bits_per_second, float)
    return np.where(payload > 0, seconds, 0.0)


def _per_device(name: str, devices: Sequence[DeviceProfile], index: np.ndarray) -> np.ndarray:
    return np.array([getattr(profile, name) for profile in devices], float)[index]
