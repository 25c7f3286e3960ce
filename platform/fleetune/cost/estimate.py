"""The costs of local work on a fleet's devices: FLOPs, memory, seconds, joules; one entry per client.

Time is a roofline of every operator (`seconds_of`), then the link's latency and rate each way. Energy is idle power over the
turn, what computing adds to it, and the radio. Everything is an array over n clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from fleetune.cost.polynomials import evaluate, monomials
from fleetune.cost.trace import PARTS, SideWork, StepTrace
from fleetune.fleet.devices import device
from fleetune.fleet.links import RadioEnergy
from fleetune.fleet.profile import DeviceProfile


@dataclass(frozen=True)
class Load:
    """The batches that n clients work on, as monomials (`cost.polynomials.BASIS`): costs are linear in these."""

    num_steps: np.ndarray  # (n,)
    mean: np.ndarray  # (n, NUM), the mean over a client's steps: decides FLOPs, bytes and time
    largest: np.ndarray  # (n, NUM), the most that any of its steps has of each monomial: decides memory

    @classmethod
    def equal(cls, num_steps: np.ndarray, batch_size: ArrayLike, num_tokens: ArrayLike, num_logits: ArrayLike) -> Load:
        """Load of clients whose steps are all equal: scalars or (n,) of a step's examples, tokens per example, and logits."""
        basis = monomials(*np.broadcast_arrays(batch_size, num_tokens, num_logits, num_steps)[:3])
        return cls(num_steps, basis, basis)

    @classmethod
    def of_steps(cls, owner: np.ndarray, basis: np.ndarray, num_clients: int) -> Load:
        """Load from the monomials of all t steps, ``basis (t, NUM)``; ``owner (t,)`` is the client of each."""
        num_steps = np.bincount(owner, minlength=num_clients)
        sums = np.stack([np.bincount(owner, column, num_clients) for column in basis.T], axis=1)
        largest = np.zeros((num_clients, basis.shape[1]))
        np.maximum.at(largest, owner, basis)
        return cls(num_steps, sums / np.maximum(num_steps, 1)[:, None], largest)

    def at(self, where: np.ndarray) -> Load:
        """The load of the clients at these places, (m,) int."""
        return Load(self.num_steps[where], self.mean[where], self.largest[where])


@dataclass(frozen=True)
class Traffic:
    """The bytes that n clients receive and send in a turn, and their links. Scalars stand for n equal entries."""

    downlink_bytes: ArrayLike  # (n,) from the server to the client
    uplink_bytes: ArrayLike  # (n,) from the client to the server
    down_bps: ArrayLike  # (n,) bits per second
    up_bps: ArrayLike  # (n,) bits per second
    latency_seconds: ArrayLike  # (n,) of one message, one way
    num_messages: ArrayLike = 1  # (n,) each way
    radio: RadioEnergy | None = None  # None: sending and receiving take no energy of their own

    def seconds(self, num_clients: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of receiving and of sending, (n,) each: latency of the messages and time on the wire."""
        ways = ((self.downlink_bytes, self.down_bps), (self.uplink_bytes, self.up_bps))
        latency = np.broadcast_to(np.asarray(self.latency_seconds, float), num_clients)
        latency = latency * np.broadcast_to(np.asarray(self.num_messages, float), num_clients)
        down, up = (_on_the_wire(num_bytes, bps, latency) for num_bytes, bps in ways)
        return down, up


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
    compute_seconds: np.ndarray  # (n,) the client's own computing, all steps
    server_seconds: np.ndarray  # (n,) the server's computing in the client's steps
    downlink_seconds: np.ndarray  # (n,) from the server to the client, latency included
    uplink_seconds: np.ndarray  # (n,) from the client to the server, latency included
    sim_seconds: np.ndarray  # (n,) the client's whole turn, the sum of the four above
    energy_joules: np.ndarray  # (n,) joules that the client's device takes in its turn

    def __len__(self) -> int:
        return len(self.flops)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def row(self, client: int) -> dict[str, float]:
        """The costs of one client, as plain values."""
        return {name: column[client].item() for name, column in self.columns().items()}


def estimate(
    trace: StepTrace,
    load: Load,
    traffic: Traffic,
    *,
    precision: str,
    devices: Sequence[DeviceProfile],
    device_index: np.ndarray,
    server: DeviceProfile | None = None,
    server_load: Load | None = None,
) -> CostTable:
    """What the traced work costs each of n clients, whose devices are ``devices[device_index (n,)]``.

    ``server`` is the one of split learning, server-a100 by default; ``server_load`` what it works on for the clients, by default
    what they work on themselves.
    """
    index = np.asarray(device_index)
    steps, served = load.num_steps, server_load or load
    compute_seconds = steps * seconds_of(trace.client, load.mean, precision, devices, index)
    server_seconds = np.zeros(index.shape)
    if trace.server.num_ops:
        servers = (server or device("server-a100"),)
        server_seconds = served.num_steps * seconds_of(
            trace.server, served.mean, precision, servers, np.zeros_like(index)
        )
    parts = dict(zip(PARTS, trace.peak(load.largest).T, strict=True))
    downlink_seconds, uplink_seconds = traffic.seconds(len(index))
    sim_seconds = downlink_seconds + compute_seconds + server_seconds + uplink_seconds

    idle = per_device("idle_watts", devices, index)
    energy = idle * sim_seconds + (per_device("active_watts", devices, index) - idle) * compute_seconds
    if traffic.radio is not None:
        energy = energy + traffic.radio.joules(
            traffic.downlink_bytes,
            traffic.uplink_bytes,
            down_bps=traffic.down_bps,
            up_bps=traffic.up_bps,
            link_seconds=downlink_seconds + uplink_seconds,
            quiet_seconds=compute_seconds + server_seconds,
            num_messages=np.broadcast_to(np.asarray(traffic.num_messages, float), index.shape),
        )
    return CostTable(
        flops=steps * evaluate(trace.client.flops, load.mean),
        server_flops=served.num_steps * evaluate(trace.server.flops, served.mean),
        peak_memory_bytes=sum(parts.values(), np.zeros(index.shape)),
        weights_bytes=parts["weights"],
        adapter_bytes=parts["adapters"],
        gradient_bytes=parts["gradients"],
        optimizer_bytes=parts["optimizer"],
        activation_bytes=parts["saved"] + parts["logits"] + parts["workspace"],
        compute_seconds=compute_seconds,
        server_seconds=server_seconds,
        downlink_seconds=downlink_seconds,
        uplink_seconds=uplink_seconds,
        sim_seconds=sim_seconds,
        energy_joules=energy,
    )


def seconds_of(
    work: SideWork, basis: np.ndarray, precision: str, devices: Sequence[DeviceProfile], device_index: np.ndarray
) -> np.ndarray:
    """Seconds (n,) of one step for n clients: their batches ``basis (n, NUM)``, their devices ``devices[device_index (n,)]``.

    Every operator has its own roofline: it takes ``max(FLOPs / rate, bytes / bandwidth)``, and its launch (Williams, Waterman
    and Patterson 2009, doi:10.1145/1498765.1498785). Bytes are those of its distinct inputs and outputs, as in eager execution
    without a cache between operators; fused kernels move less.
    """
    rate = np.array([profile.sustained_flops(precision) for profile in devices])[device_index]
    bandwidth = np.array([profile.sustained_bytes_per_second for profile in devices])[device_index]
    launch = np.array([profile.launch_seconds for profile in devices])[device_index]
    seconds = evaluate(work.moved, basis) / bandwidth + work.num_ops * launch
    for (flops, moved), count in zip(work.products, work.counts, strict=True):
        seconds += count * np.maximum(evaluate(flops, basis) / rate, evaluate(moved, basis) / bandwidth)
    return seconds


def overlapped(
    costs: dict[str, np.ndarray],
    *,
    adapter_down_seconds: np.ndarray,
    adapter_up_seconds: np.ndarray,
    idle_watts: np.ndarray,
) -> dict[str, np.ndarray]:
    """The costs (n,) of split turns in sequence, with their parts overlapped: shorter turns, and less idle power.

    Client, both links and server are then busy at once, on different micro-batches, so that the steps take as long as the
    slowest of the client's computing, the server's, and the cut's transfers each way; the adapter still crosses the link before
    and after them. Filling and draining the pipeline is not counted, so this is the best that overlapping can do.
    """
    steps = np.maximum.reduce(
        [
            costs["compute_seconds"],
            costs["server_seconds"],
            costs["downlink_seconds"] - adapter_down_seconds,
            costs["uplink_seconds"] - adapter_up_seconds,
        ]
    )
    turn = adapter_down_seconds + steps + adapter_up_seconds
    saved = idle_watts * (costs["sim_seconds"] - turn)
    return {**costs, "sim_seconds": turn, "energy_joules": costs["energy_joules"] - saved}


def per_device(name: str, devices: Sequence[DeviceProfile], index: np.ndarray) -> np.ndarray:
    """A property of each client's device, (n,)."""
    return np.array([getattr(profile, name) for profile in devices], float)[index]


def _on_the_wire(num_bytes: ArrayLike, bits_per_second: ArrayLike, latency: np.ndarray) -> np.ndarray:
    """Seconds (n,) of moving these bytes, ``latency (n,)`` of all messages included; no time if there are no bytes."""
    payload = np.broadcast_to(np.asarray(num_bytes, float), latency.shape)
    seconds = latency + 8 * payload / np.asarray(bits_per_second, float)
    return np.where(payload > 0, seconds, 0.0)
