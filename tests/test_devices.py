"""Devices and networks: numbers that can be worked out, and names that can be misspelt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fleetune.errors import UserError
from fleetune.fleet.devices import DEVICES, device, markdown
from fleetune.fleet.fleet import FleetConfig, build_fleet
from fleetune.fleet.networks import NETWORKS, RadioEnergy, network


def test_orin_nano_4gb_peak_follows_from_its_cores_and_clock():
    """512 cores x 2 x 0.625 GHz = 0.64 TFLOP/s; 16 tensor cores x 256 FMA x 2 x 0.625 GHz = 5.1 TFLOP/s."""
    profile = device("jetson-orin-nano-4gb")
    assert profile.fp32_flops == pytest.approx(512 * 2 * 0.625e9)
    assert profile.fp16_flops == pytest.approx(16 * 256 * 2 * 0.625e9, rel=0.01)


def test_budget_is_what_system_runtime_and_fragmentation_leave():
    """3964 MiB less 0.85 GB and 0.5 GB is 2.807 GB; 5 % of what tensors take is lost to fragmentation."""
    assert device("jetson-nano").budget_bytes == pytest.approx((3964 * 2**20 - 1.35e9) / 1.05)


def test_a_power_mode_scales_compute_by_clock_and_cores():
    """AGX Orin: 4 of 8 TPCs at 612 of 1300 MHz in 30 W; 3 at 408, memory 2133 of 3199 MHz in 15 W."""
    full, half, low = (device(f"jetson-agx-orin-64gb{mode}") for mode in ("", "@30w", "@15w"))
    assert half.fp16_flops / full.fp16_flops == pytest.approx(4 * 612 / (8 * 1300))
    assert half.bandwidth_bytes_per_second == full.bandwidth_bytes_per_second
    assert low.fp16_flops / full.fp16_flops == pytest.approx(3 * 408 / (8 * 1300))
    assert low.bandwidth_bytes_per_second / full.bandwidth_bytes_per_second == pytest.approx(2133 / 3199)
    assert (half.active_watts, low.active_watts, low.name) == (30, 15, "jetson-agx-orin-64gb@15w")
    assert half.budget_bytes == full.budget_bytes


@pytest.mark.parametrize("profile", DEVICES.values(), ids=str)
def test_every_device_is_complete_and_says_where_its_numbers_come_from(profile):
    assert {group for group, _ in profile.sources} == {
        "compute", "sustained", "bandwidth", "memory", "power", "launch", "bf16",
    }  # fmt: skip
    assert all(source.strip() for _, source in profile.sources)
    assert 0 < profile.sustained_fp32 <= 1
    assert 0 < profile.sustained_fp16 <= 1
    assert profile.fp16_flops >= profile.fp32_flops
    assert profile.budget_bytes > 1e9
    assert profile.active_watts > profile.idle_watts > 0
    for mode, chosen in profile.modes:
        assert 0 < chosen.compute_fraction <= 1
        assert device(f"{profile.name}@{mode}").active_watts > device(f"{profile.name}@{mode}").idle_watts


def test_a_device_without_bf16_says_whose_rate_stands_for_it():
    """Maxwell, Pascal and Volta have none, Ampere has; a CPU older than Armv8.6 computes in fp32."""
    fleet = build_fleet(
        FleetConfig(
            devices={"jetson-nano": 0.3, "jetson-tx2": 0.3, "jetson-orin-nx-8gb": 0.2, "raspberry-pi-5-8gb": 0.2}
        ),
        0,
    )
    assert fleet.rate_notes("fp32") == []
    assert fleet.rate_notes("bf16") == [
        "no bf16 on jetson-nano, jetson-tx2: the fp16 rate stands for it",
        "no bf16 on raspberry-pi-5-8gb: the fp32 rate stands for it",
    ]
    nano = device("jetson-nano")
    assert nano.sustained_flops("bf16") == nano.fp16_flops * nano.sustained_fp16
    assert device("raspberry-pi-5-8gb").sustained_flops("bf16") == device("raspberry-pi-5-8gb").sustained_flops("fp32")


def test_a_misspelt_name_gets_the_nearest_right_one():
    with pytest.raises(UserError, match="did you mean 'jetson-nano'") as caught:
        device("jetson-nanoo")
    assert caught.value.field == "fleet.devices"
    with pytest.raises(UserError, match="did you mean '30w'"):
        device("jetson-agx-orin-64gb@30")
    with pytest.raises(UserError, match="did you mean 'wifi'"):
        network("wify")


def test_the_page_of_devices_is_the_one_that_is_generated():
    page = Path(__file__).parents[1] / "docs" / "devices.md"
    assert page.read_text() == markdown()


def test_lte_radio_costs_what_the_2012_measurements_say():
    """1 MB up at 5.5 Mbit/s takes 1.4545 s: 3.507 J for the rate, 1.288 W x 1.4545 s = 1.874 J, 5.38 J."""
    lte = network("lte")
    radio = RadioEnergy(
        downlink_joules_per_byte=np.array([lte.downlink_joules_per_megabyte / 1e6]),
        uplink_joules_per_byte=np.array([lte.uplink_joules_per_megabyte / 1e6]),
        radio_watts=np.array([lte.radio_watts]),
    )
    assert radio.joules(0, 1e6, 8 / 5.5)[0] == pytest.approx(5.38, abs=0.01)


def test_every_network_has_a_source_and_rates_below_its_limit():
    assert {"wifi", "ethernet", "lte", "5g", "3g", "fedadapter"} <= set(NETWORKS)
    for link in NETWORKS.values():
        assert link.source
        assert 0 < link.up_bps <= link.down_bps <= link.max_bps
