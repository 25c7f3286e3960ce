"""The costs of local work on a fleet's devices: FLOPs, memory, seconds, joules; one entry per client.

Time is a roofline of every operator, ``max(FLOPs / (peak · sustained), bytes / (bandwidth · sustained)) + launch``, then the
link's latency and rate each way. Energy is idle power over the round, what computing adds, and the radio. Everything is an
array over clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from fleetune.cost.polynomials import evaluate, monomials
from fleetune.cost.roofline import seconds_of
from fleetune.cost.trace import PARTS, StepTrace
from fleetune.fleet.devices import device
from fleetune.fleet.links import RadioEnergy
from fleetune.fleet.profile import DeviceProfile


@dataclass(frozen=True)
class Load:
    """What n clients work on, as monomials of their batches (`cost.polynomials`)."""

    num_steps: np.ndarray
    """(n,)"""
    mean: np.ndarray
    """(n, 6), the mean over a client's steps: counts for FLOPs, bytes and time."""
    largest: np.ndarray
    """(n, 6), the most that any of its steps has of each: counts for memory."""

    @classmethod
    def equal(cls, num_steps: np.ndarray, batch_size: ArrayLike, num_tokens: ArrayLike, num_logits: ArrayLike) -> Load:
        """Each client's steps are all alike: examples, tokens of each, positions where the loss looks in all of them."""
        basis = monomials(*np.broadcast_arrays(batch_size, num_tokens, num_logits, num_steps)[:3])
        return cls(num_steps, basis, basis)

    @classmethod
    def of_steps(cls, owner: np.ndarray, basis: np.ndarray, num_clients: int) -> Load:
        """From every step, (t, 6); ``owner (t,)`` says whose it is."""
        num_steps = np.bincount(owner, minlength=num_clients)
        sums = np.stack([np.bincount(owner, column, num_clients) for column in basis.T], axis=1)
        largest = np.zeros((num_clients, basis.shape[1]))
        np.maximum.at(largest, owner, basis)
        return cls(num_steps, sums / np.maximum(num_steps, 1)[:, None], largest)

    def at(self, where: np.ndarray) -> Load:
        """The load of some of the clients."""
        return Load(self.num_steps[where], self.mean[where], self.largest[where])


@dataclass(frozen=True)
class CostTable:
    """Costs of one round for n clients, columns (n,). Seconds are virtual; the parts of the memory are those at its peak."""

    flops: np.ndarray  # (n,) floating-point operations of the client in all its steps
    server_flops: np.ndarray  # (n,) of the server in the client's steps (split learning); else 0
    peak_memory_bytes: np.ndarray  # (n,) bytes; the sum of the five parts below, in the step that needs most
    weights_bytes: np.ndarray  # (n,) bytes of the base model's weights
    adapter_bytes: np.ndarray  # (n,) bytes of the LoRA adapters
    gradient_bytes: np.ndarray  # (n,) bytes of the gradients
    optimizer_bytes: np.ndarray  # (n,) bytes of the optimizer's state
    activation_bytes: np.ndarray  # (n,) bytes of what the backward pass needs, logits, and temporaries
    budget_bytes: np.ndarray  # (n,) bytes of memory that the client may use
    compute_seconds: np.ndarray  # (n,) the client's own computing, all steps
    server_seconds: np.ndarray  # (n,) the server's computing in the client's steps
    downlink_seconds: np.ndarray  # (n,) from the server to the client, latency included
    uplink_seconds: np.ndarray  # (n,) from the client to the server, latency included
    sim_seconds: np.ndarray  # (n,) the client's whole turn, the sum of the four above
    energy_joules: np.ndarray  # (n,) joules that the client's device takes in its turn
    over_budget: np.ndarray  # (n,) bool: peak_memory_bytes > budget_bytes

    def __len__(self) -> int:
        return len(self.flops)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def row(self, client: int) -> dict[str, float | bool]:
        """The costs of one client, as plain values."""
        return {name: column[client].item() for name, column in self.columns().items()}


def estimate(
    trace: StepTrace,
    load: Load,
    *,
    precision: str,
    devices: Sequence[DeviceProfile],
    device_index: np.ndarray,  # (n,) into devices
    downlink_bytes: ArrayLike,  # (n,)
    uplink_bytes: ArrayLike,  # (n,)
    down_bps: ArrayLike,  # (n,) bits per second
    up_bps: ArrayLike,  # (n,)
    latency_seconds: ArrayLike,  # (n,) one way
    num_messages: ArrayLike = 1,  # each way
    radio: RadioEnergy | None = None,
    server: DeviceProfile | None = None,  # of split learning; default server-a100
) -> CostTable:
    """What the traced work costs each of n clients. Scalars stand for n equal entries."""
    index = np.asarray(device_index)
    num_msgs, latency = (
        np.broadcast_to(np.asarray(values, float), index.shape) for values in (num_messages, latency_seconds)
    )
    steps = load.num_steps
    compute_seconds = steps * seconds_of(trace.client, load.mean, precision, devices, index)
    server_seconds = np.zeros(index.shape)
    if trace.server.num_ops:
        host = (server or device("server-a100"),)
        server_seconds = steps * seconds_of(trace.server, load.mean, precision, host, np.zeros_like(index))

    parts = dict(zip(PARTS, trace.peak(load.largest).T, strict=True))
    peak = sum(parts.values(), np.zeros(index.shape))
    budget = per_device("budget_bytes", devices, index)

    downlink_seconds = _link_seconds(downlink_bytes, down_bps, latency, num_msgs)
    uplink_seconds = _link_seconds(uplink_bytes, up_bps, latency, num_msgs)
    sim_seconds = downlink_seconds + compute_seconds + server_seconds + uplink_seconds

    idle = per_device("idle_watts", devices, index)
    energy = idle * sim_seconds + (per_device("active_watts", devices, index) - idle) * compute_seconds
    if radio is not None:
        energy = energy + radio.joules(
            downlink_bytes,
            uplink_bytes,
            down_bps=down_bps,
            up_bps=up_bps,
            link_seconds=downlink_seconds + uplink_seconds,
            quiet_seconds=compute_seconds + server_seconds,
            num_messages=num_msgs,
        )

    return CostTable(
        flops=steps * evaluate(trace.client.flops, load.mean),
        server_flops=steps * evaluate(trace.server.flops, load.mean),
        peak_memory_bytes=peak,
        weights_bytes=parts["weights"],
        adapter_bytes=parts["adapters"],
        gradient_bytes=parts["gradients"],
        optimizer_bytes=parts["optimizer"],
        activation_bytes=parts["saved"] + parts["logits"] + parts["workspace"],
        budget_bytes=budget,
        compute_seconds=compute_seconds,
        server_seconds=server_seconds,
        downlink_seconds=downlink_seconds,
        uplink_seconds=uplink_seconds,
        sim_seconds=sim_seconds,
        energy_joules=energy,
        over_budget=peak > budget,
    )


def per_device(name: str, devices: Sequence[DeviceProfile], index: np.ndarray) -> np.ndarray:
    """A property of each client's device, (n,)."""
    return np.array([getattr(profile, name) for profile in devices], float)[index]


def _link_seconds(
    num_bytes: ArrayLike, bits_per_second: ArrayLike, latency: np.ndarray, num_messages: np.ndarray
) -> np.ndarray:
    """Latency of the messages and time on the wire; nothing to send takes no time."""
    payload = np.broadcast_to(np.asarray(num_bytes, float), latency.shape)
    seconds = latency * num_messages + 8 * payload / np.asarray(bits_per_second, float)
    return np.where(payload > 0, seconds, 0.0)
