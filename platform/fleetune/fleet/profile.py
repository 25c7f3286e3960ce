"""Device profiles: rates, memory and power of a device, each with its source, and its power modes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from fleetune.errors import unknown_name

# Memory that the caching allocator reserves beyond the tensors. Measured 0 to 6 % in the runs of
# huggingface/peft's method comparison (reserved against allocated).
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class PowerMode:
    """Fractions of the device at its maximum: compute = clock x powered cores, bandwidth = memory clock."""

    watts: float
    """The mode's cap."""
    compute_fraction: float
    bandwidth_fraction: float = 1.0
    clock_fraction: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """One kind of device. ``sources`` says of each group of numbers where they come from."""

    name: str
    fp32_flops: float
    """Peak FLOP/s in fp32."""
    fp16_flops: float
    """Peak dense FLOP/s in 16 bit: tensor cores where they exist."""
    sustained_fp32: float
    """Fraction of ``fp32_flops`` that training reaches."""
    sustained_fp16: float
    bandwidth_bytes_per_second: float
    """Peak memory bandwidth."""
    sustained_bandwidth_fraction: float
    memory_bytes: float
    """Memory that the operating system sees (GPU memory on a server)."""
    os_idle_bytes: float
    """The part of it that the idle system uses; swap does not count as memory."""
    context_bytes: float
    """The part of it that the runtime (CUDA context, PyTorch) needs before the first tensor."""
    idle_watts: float
    active_watts: float
    launch_seconds: float
    """Host time per kernel or operator."""
    bf16: Literal["native", "fp16", "fp32"] = "native"
    """``native`` if it computes in bf16; otherwise the precision whose rate stands for bf16's."""
    modes: tuple[tuple[str, PowerMode], ...] = ()
    sources: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    @property
    def budget_bytes(self) -> float:
        """Bytes for tensors: those that system and runtime leave, less the allocator's fragmentation."""
        return (self.memory_bytes - self.os_idle_bytes - self.context_bytes) / (1 + FRAGMENTATION)

    @property
    def sustained_bytes_per_second(self) -> float:
        """Bytes per second that training reaches."""
        return self.bandwidth_bytes_per_second * self.sustained_bandwidth_fraction

    def sustained_flops(self, precision: str) -> float:
        """FLOP/s that training reaches in ``fp32`` or ``bf16``."""
        if precision == "fp32":
            return self.fp32_flops * self.sustained_fp32
        return self.fp16_flops * self.sustained_fp16

    def stand_in(self, precision: str) -> str | None:
        """The precision whose rate is taken for one that the device does not have; None if the device has it."""
        return None if precision != "bf16" or self.bf16 == "native" else self.bf16

    def in_mode(self, mode: str) -> DeviceProfile:
        """The device in a power mode (``30w``). Raises UserError if it does not have that mode.

        A slower clock needs a lower voltage, so what computing adds to the idle power is taken to fall with the powered cores
        and the square of the clock (assumed), and to stay below the mode's cap. That gives 8 to 36 % more work per joule in the
        first mode below full power of an Orin; on an Orin Nano Super 8 to 35 % more tokens per joule were measured at 25 W.
        """
        modes = dict(self.modes)
        if mode not in modes:
            raise unknown_name(f"power mode of {self.name}", mode, modes, field="fleet.devices")
        chosen = modes[mode]
        busy = (self.active_watts - self.idle_watts) * chosen.compute_fraction * chosen.clock_fraction
        return replace(
            self,
            name=f"{self.name}@{mode}",
            fp32_flops=self.fp32_flops * chosen.compute_fraction,
            fp16_flops=self.fp16_flops * chosen.compute_fraction,
            bandwidth_bytes_per_second=self.bandwidth_bytes_per_second * chosen.bandwidth_fraction,
            active_watts=min(chosen.watts, self.idle_watts + busy),
            idle_watts=min(self.idle_watts, chosen.watts),
            modes=(),
        )
