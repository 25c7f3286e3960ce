"""Devices and links as data: a YAML file with a unit beside every number, and a source beside every group of numbers.

fleetune's own are devices.yaml and networks.yaml beside this module; a job names others in ``fleet.device_files``. All are
read and checked here, by one rule. A number with a unit is text: ``3964 MiB``, ``25.6 GB/s``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, model_validator

from fleetune.config import Config
from fleetune.errors import UserError, nearest, unknown_name
from fleetune.fleet.links import NetworkProfile
from fleetune.fleet.profile import DeviceProfile, PowerMode

FIELD = "fleet.device_files"
BUILT_IN = ("devices.yaml", "networks.yaml")


def _units(known: Mapping[str, float]) -> BeforeValidator:
    """A field that takes text such as ``25.6 GB/s``, in one of these units, and gives it in SI's."""

    def read(value: Any) -> float:
        number, _, unit = str(value).strip().partition(" ")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if unit.strip() not in known or not math.isfinite(amount) or amount < 0:
            example = f"such as '3 {next(iter(known))}'"
            raise ValueError(
                f"must be a number that is not negative and its unit, {example}; units: {', '.join(known)}"
            )
        return amount * known[unit.strip()]

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
"""How much of how much: ``[612, 1300]``."""


class ComputeEntry(Config):
    """Peak FLOP/s."""

    fp32: Rate
    fp16: Rate
    """Dense, in 16 bit: tensor cores where they exist."""
    source: Source


class Bf16Entry(Config):
    """Whether it computes in bf16 (``native``), or whose rate stands for it."""

    rate: Literal["native", "fp16", "fp32"]
    source: Source


class SustainedEntry(Config):
    """The fractions of the peak rates that training reaches."""

    fp32: Fraction
    fp16: Fraction
    source: Source


class BandwidthEntry(Config):
    """Of the memory."""

    peak: Bandwidth
    sustained: Fraction
    source: Source


class MemoryEntry(Config):
    """What the operating system sees, and what of it is not there for tensors."""

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
    """Of the whole device: idle, and while it computes."""

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
    """A power mode: its cap, and what of the full device runs."""

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
        """As fractions of the full device."""
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
    """What the radio draws beside the device: watts for each Mbit/s up to a rate, a base while it is busy, a tail after."""

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
    """All that a file may hold."""

    devices: dict[Name, DeviceEntry] = Field(default_factory=dict)
    networks: dict[Name, NetworkEntry] = Field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """Devices and links by name."""

    devices: dict[str, DeviceProfile]
    networks: dict[str, NetworkProfile]

    def device(self, name: str, *, field: str = "fleet.devices") -> DeviceProfile:
        """The device of that name, or one of its power modes (``name@mode``); ``UserError`` if unknown."""
        base, _, mode = name.partition("@")
        if base not in self.devices:
            raise unknown_name("device", name, self.devices, field=field)
        return self.devices[base].in_mode(mode) if mode else self.devices[base]

    def network(self, name: str, *, field: str = "fleet.network") -> NetworkProfile:
        """The link of that name; ``UserError`` with the nearest name for an unknown one."""
        if name not in self.networks:
            raise unknown_name("network", name, self.networks, field=field)
        return self.networks[name]


@functools.cache
def built_in() -> Catalogue:
    """What ships with fleetune."""
    return _joined(Catalogue({}, {}), [str(Path(__file__).with_name(name)) for name in BUILT_IN])


def catalogue(files: Sequence[str]) -> Catalogue:
    """What ships with fleetune, and what these files add. ``UserError`` names file, entry, field and rule."""
    return _joined(built_in(), files) if files else built_in()


def _joined(known: Catalogue, files: Sequence[str]) -> Catalogue:
    devices, networks = dict(known.devices), dict(known.networks)
    for path in files:
        found = read(path)
        for kind, entries, into in (("devices", found.devices, devices), ("networks", found.networks, networks)):
            for name in entries:
                if name in into:
                    raise UserError(f"{path}, {kind}.{name}: there is one of this name already", field=FIELD, value=name,
                                    hint="give it another name")  # fmt: skip
        devices |= {name: entry.profile(name) for name, entry in found.devices.items()}
        networks |= {name: entry.profile(name) for name, entry in found.networks.items()}
    return Catalogue(devices, networks)


def read(path: str) -> DeviceFile:
    """A checked file of devices and links."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the device file cannot be read: {error}", field=FIELD, value=path) from None
    try:
        values = yaml.load(text, Loader=_Loader)  # a safe loader: PyYAML's own in C, where it is there
        return DeviceFile.model_validate({} if values is None else values)
    except ValidationError as error:
        raise _in_our_words(path, error) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}", field=FIELD, value=path) from None


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """Safe, and a name that stands twice in one mapping is an error, where YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ValueError(f"line {line}: {key.value!r} stands twice, first in line {seen[key.value]}")
            seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


def _in_our_words(path: str, error: ValidationError) -> UserError:
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"] if part != "[key]"]
    rule, hint = first["msg"].removeprefix("Value error, "), None
    if first["type"] == "extra_forbidden":
        known = _fields_at(where[:-1])
        guess = nearest(where[-1], known)
        rule = "unknown field"
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}"
    elif first["loc"][-1:] == ("[key]",):
        rule = "a name has small letters, digits, '.', '_' and '-'"
    value = first.get("input")
    shown = value if isinstance(value, (str, int, float)) and first["type"] != "missing" else path
    return UserError(
        f"{path}, {'.'.join(where)}: {rule}" if where else f"{path}: {rule}", field=FIELD, value=shown, hint=hint
    )


def _fields_at(where: Sequence[str]) -> list[str]:
    """The fields that may stand at a place in a file."""
    model: Any = DeviceFile
    for part in where:
        fields: Mapping[str, Any] = getattr(model, "model_fields", {})
        if part not in fields:  # the name of an entry
            continue
        kinds = (fields[part].annotation, *getattr(fields[part].annotation, "__args__", ()))
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), model)
    return list(model.model_fields)
