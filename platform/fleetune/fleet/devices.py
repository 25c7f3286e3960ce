"""The devices that ship with fleetune: fleet/devices.yaml, all Jetson modules, boards, phones and servers.

FP32 peak = cores x 2 x clock; vector FP16 is twice that on every Jetson; tensor FP16 = tensor cores x FMA per
clock x 2 x clock, dense. Marketing TOPS (sparse INT8, accelerators included) are never used. "recalled" marks
a number that was not read again at its source, "assumed" one that has none; both are to be replaced when a
better one is at hand.

Where a device has no bf16 arithmetic, `cost.precision: bf16` takes the rate that the table names; a plan and a run say so.

A sustained fraction is *fitted* where steps were measured on the device: with that fraction of the peak the cost model,
memory-bound operators and kernel launches included, gives their seconds (`python -m fleetune.pricing.fit`). All others
are assumed.

Lower power modes have a cap; what they draw while computing is assumed to fall with the powered cores and the square
of the clock, and to stay below it.
"""

from __future__ import annotations

from fleetune.fleet.device_file import built_in
from fleetune.fleet.profile import DeviceProfile

DEVICES: dict[str, DeviceProfile] = built_in().devices


def device(name: str, *, field: str = "fleet.devices") -> DeviceProfile:
    """The device of that name that ships with fleetune, or one of its power modes (``jetson-agx-orin-64gb@30w``).

    Raises UserError if there is none.
    """
    return built_in().device(name, field=field)


def markdown() -> str:
    """The page of all devices: rates, memory, power, and the source of every group of numbers."""
    columns = "| device | fp32 TFLOP/s | 16-bit TFLOP/s | sustained | GB/s | GB for tensors | W | bf16 | modes |"
    lines = ["# Devices", "", *(__doc__ or "").splitlines()[2:], "", columns, "|" + "---|" * 9]
    for profile in DEVICES.values():
        lines.append(
            f"| {profile.name} | {profile.fp32_flops / 1e12:.3g} | {profile.fp16_flops / 1e12:.4g} "
            f"| {profile.sustained_fp32:g} / {profile.sustained_fp16:g} "
            f"| {profile.bandwidth_bytes_per_second / 1e9:g} x {profile.sustained_bandwidth_fraction:g} "
            f"| {profile.budget_bytes / 1e9:.2f} | {profile.idle_watts:g} to {profile.active_watts:g} "
            f"| {'yes' if profile.bf16 == 'native' else f'as {profile.bf16}'} "
            f"| {', '.join(name for name, _ in profile.modes) or '-'} |"
        )
    lines += ["", "## Sources"]
    for profile in DEVICES.values():
        lines += [
            "",
            f"**{profile.name}**",
            "",
            *(f"- {group}: {source}." for group, source in profile.sources),
        ]
    return "\n".join(lines) + "\n"
