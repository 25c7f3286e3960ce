"""A client's budgets for a round: memory at once, virtual seconds, joules, and bytes on its link.

A client that would need more is refused before it starts, and costs nothing. Budgets hold for all clients or by device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationInfo, field_validator

from fleetune.config import Config
from fleetune.errors import UserError
from fleetune.fleet.profile import DeviceProfile

MEMORY, SECONDS, JOULES, BYTES = "memory", "seconds", "joules", "bytes"


class BudgetsConfig(Config):
    """What a client may spend in one round; a number for all, or one for each device that is named. null: no limit."""

    memory_bytes: float | dict[str, float] | None = None
    """Largest memory at once. null: what the device offers."""
    seconds_per_round: float | dict[str, float] | None = None
    """Virtual time of the whole turn: receiving, computing and sending."""
    joules_per_round: float | dict[str, float] | None = None
    """Energy of the turn."""
    bytes_per_round: float | dict[str, float] | None = None
    """Bytes over the link, both ways together."""

    @field_validator("*")
    @classmethod
    def _positive(cls, value: float | dict[str, float] | None, info: ValidationInfo) -> float | dict[str, float] | None:
        limits: Mapping[str, float | None] = value if isinstance(value, dict) else {"": value}
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                field = ".".join(part for part in ("fleet.budgets", info.field_name, name) if part)
                raise UserError("must be greater than 0", field=field, value=limit, hint="leave it out for no limit")
        return value

    def named_devices(self) -> set[str]:
        """Devices that a budget names."""
        values = [getattr(self, field) for field in type(self).model_fields]
        return {name for value in values if isinstance(value, dict) for name in value}


@dataclass(frozen=True)
class Budgets:
    """Limits per kind of device; infinity means no limit."""

    memory_bytes: np.ndarray  # (num_devices,)
    seconds: np.ndarray  # (num_devices,) virtual, of a client's turn
    joules: np.ndarray  # (num_devices,)
    bytes: np.ndarray  # (num_devices,) both ways together

    def broken(self, device_index: np.ndarray, costs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The name of a budget that each of n clients would break, or None: objects (n,). Of several, memory counts first.

        ``device_index (n,)``; ``costs``: the needs of the full turn, columns (n,) by their names in clients.parquet.
        """
        needs = (
            (BYTES, costs["downlink_bytes"] + costs["uplink_bytes"], self.bytes),
            (JOULES, costs["energy_joules"], self.joules),
            (SECONDS, costs["sim_seconds"], self.seconds),
            (MEMORY, costs["peak_memory_bytes"], self.memory_bytes),
        )
        out = np.full(len(device_index), None, dtype=object)
        # Memory is checked last and so overrides the others: work that does not fit cannot even start.
        for name, need, limits in needs:
            out[need > limits[device_index]] = name
        return out


def build_budgets(config: BudgetsConfig, devices: Sequence[DeviceProfile]) -> Budgets:
    """The limits of a job for each of its devices."""

    def limits(value: float | dict[str, float] | None, otherwise: Sequence[float]) -> np.ndarray:
        if not isinstance(value, dict):
            return np.array(otherwise if value is None else [value] * len(devices), float)
        return np.array([value.get(d.name, free) for d, free in zip(devices, otherwise, strict=True)], float)

    free = [np.inf] * len(devices)
    return Budgets(
        memory_bytes=limits(config.memory_bytes, [device.budget_bytes for device in devices]),
        seconds=limits(config.seconds_per_round, free),
        joules=limits(config.joules_per_round, free),
        bytes=limits(config.bytes_per_round, free),
    )
