"""The entries of a device file: the fields of a device and of a link, with their units and rules, and the profiles made of them.

A number with a unit is text: ``3964 MiB``, ``25.6 GB/s``. Every group of numbers names its source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from fleetune.config import Config
from fleetune.fleet.links import NetworkProfile
from fleetune.fleet.profile import DeviceProfile, PowerMode


def _units(factors: Mapping[str, float]) -> BeforeValidator:
    """A field that takes text such as ``25.6 GB/s`` and gives the number in SI units. ``factors``: unit -> its size in SI's."""

    def read(value: Any) -> float:
        number, _, unit = str(value).strip().partition(" ")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if unit.strip() not in factors or not math.isfinite(amount) or amount < 0:
            example = f"such as '3 {next(iter(factors))}'"
            raise ValueError(
                f"must be a number that is not negative and its unit, {example}; units: {', '.join(factors)}"
            )
        return amount * factors[unit.strip()]

    return BeforeValidator(read)


Rate = Annotated[float, _units({"TFLOP/s": 1e12, "GFLOP/s": 1e9}), Field(gt=0)]
Bandwidth = Annotated[float, _units({"GB/s": 1e9}), Field(gt=0)]
Memory = Annotated[float, _units({"MiB": 2**20, "GiB": 2**30, "GB": 1e9})]
Watts = Annotated[float, _units({"W": 1.0})]
Joules = Annotated[float, _units({"J": 1.0})]
Seconds = Annotated[float, _units({"us": 1e-6, "ms": 1e-3, "s": 1.0})]
LinkRate = Annotated[float, _units({"Mbit/s": 1e6, "kbit/s": 1e3, "Gbit/s": 1e9}), Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Source = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
OfFull = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
"""[in this mode, at full power]: ``[612, 1300]`` MHz."""


class ComputeEntry(Config):
    """Peak FLOP/s."""

    fp32: Rate
    fp16: Rate
    """Dense, in 16 bit: tensor cores where they exist."""
    source: Source


class Bf16Entry(Config):
    """``native`` if the device computes in bf16; otherwise the precision whose rate stands for bf16's."""

    rate: Literal["native", "fp16", "fp32"]
    source: Source


class SustainedEntry(Config):
    """The fractions of the peak rates that training reaches."""

    fp32: Fraction
    fp16: Fraction
    source: Source


class BandwidthEntry(Config):
    """Bandwidth of the memory, and the fraction of it that training reaches."""

    peak: Bandwidth
    sustained: Fraction
    source: Source


class MemoryEntry(Config):
    """Memory that the operating system sees, and the parts of it that are not free for tensors."""

    total: Memory
    os_idle: Memory
    context: Memory
    source: Source

    @model_validator(mode="after")
    def _something_is_left(self) -> MemoryEntry:
        if self.total <= self.os_idle + self.context:
            raise ValueError("total must exceed os_idle and context together: the rest holds the tensors")
        return self


class PowerEntry(Config):
    """Power of the full device: idle, and while it computes."""

    idle: Watts
    active: Watts
    source: Source

    @model_validator(mode="after")
    def _computing_costs(self) -> PowerEntry:
        if self.active <= self.idle:
            raise ValueError("active must exceed idle")
        return self


class LaunchEntry(Config):
    """Host time for each kernel or operator."""

    per_operator: Seconds
    source: Source


class ModeEntry(Config):
    """A power mode: its cap, and the part of the full device that runs."""

    cap: Watts
    cores: OfFull
    clock: OfFull
    memory_clock: OfFull = (1.0, 1.0)

    @model_validator(mode="after")
    def _parts_of_the_full_device(self) -> ModeEntry:
        for name in ("cores", "clock", "memory_clock"):
            part, full = getattr(self, name)
            if part > full:
                raise ValueError(f"{name} must be [in this mode, at full power], the first no more than the second")
        return self

    def profile(self) -> PowerMode:
        """The mode as fractions of the full device."""
        (cores, of_cores), (clock, of_clock) = self.cores, self.clock
        memory, of_memory = self.memory_clock
        return PowerMode(self.cap, cores * clock / (of_cores * of_clock), memory / of_memory, clock / of_clock)


class DeviceEntry(Config):
    """One kind of device."""

    compute: ComputeEntry
    bf16: Bf16Entry
    sustained: SustainedEntry
    bandwidth: BandwidthEntry
    memory: MemoryEntry
    power: PowerEntry
    launch: LaunchEntry
    modes: dict[Name, ModeEntry] = Field(default_factory=dict)

    def profile(self, name: str) -> DeviceProfile:
        """As the cost model reads it."""
        groups = ("compute", "sustained", "bandwidth", "memory", "power", "launch", "bf16")
        return DeviceProfile(
            name=name, fp32_flops=self.compute.fp32, fp16_flops=self.compute.fp16,
            sustained_fp32=self.sustained.fp32, sustained_fp16=self.sustained.fp16,
            bandwidth_bytes_per_second=self.bandwidth.peak, sustained_bandwidth_fraction=self.bandwidth.sustained,
            memory_bytes=self.memory.total, os_idle_bytes=self.memory.os_idle, context_bytes=self.memory.context,
            idle_watts=self.power.idle, active_watts=self.power.active, launch_seconds=self.launch.per_operator,
            bf16=self.bf16.rate, modes=tuple((mode, entry.profile()) for mode, entry in self.modes.items()),
            sources=tuple((group, getattr(self, group).source) for group in groups),
        )  # fmt: skip


class RadioEntry(Config):
    """Power of the radio, beside the device's: watts per Mbit/s up to a rate, a base while it is busy, and a tail after."""

    down_watts_per_mbps: float = Field(ge=0)
    up_watts_per_mbps: float = Field(ge=0)
    base: Watts
    linear_to: LinkRate
    tail: Joules = Field(default="0 J", validate_default=True)
    tail_time: Seconds = Field(default="1 s", gt=0, validate_default=True)
    source: Source


class NetworkEntry(Config):
    """One kind of link: median rates, one-way latency, and the spread of its lognormal over clients and rounds."""

    down: LinkRate
    up: LinkRate
    latency: Seconds
    sigma: float = Field(default=0.0, ge=0)
    max: LinkRate | None = None
    radio: RadioEntry | None = None
    source: Source

    @model_validator(mode="after")
    def _below_its_limit(self) -> NetworkEntry:
        if self.max is not None and self.max < max(self.down, self.up):
            raise ValueError("max must be at least down and up")
        return self

    def profile(self, name: str) -> NetworkProfile:
        """As the fleet reads it."""
        radio: dict[str, float] = {}
        # A megabyte is 8 megabits, so watts per Mbit/s times 8 are joules per megabyte.
        if self.radio is not None:
            radio = {
                "downlink_joules_per_megabyte": 8 * self.radio.down_watts_per_mbps,
                "uplink_joules_per_megabyte": 8 * self.radio.up_watts_per_mbps,
                "radio_watts": self.radio.base,
                "radio_linear_to_bps": self.radio.linear_to,
                "tail_joules": self.radio.tail,
                "tail_seconds": self.radio.tail_time,
            }
        limit = math.inf if self.max is None else self.max
        return NetworkProfile(
            name=name, down_bps=self.down, up_bps=self.up, latency_seconds=self.latency, sigma=self.sigma, max_bps=limit,
            source=self.source, **radio,
        )  # fmt: skip


class DeviceFile(Config):
    """The content of a file: devices and links by name."""

    devices: dict[Name, DeviceEntry] = Field(default_factory=dict)
    networks: dict[Name, NetworkEntry] = Field(default_factory=dict)
