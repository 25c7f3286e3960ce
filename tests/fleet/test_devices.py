"""Devices and networks: numbers that can be worked out, and names that can be misspelt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fleetune.errors import UserError
from fleetune.fleet.device_file import built_in, catalogue
from fleetune.fleet.devices import DEVICES, device
from fleetune.fleet.fleet import FleetConfig, build_fleet
from fleetune.fleet.networks import NETWORKS, network


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
    assert low.name == "jetson-agx-orin-64gb@15w"
    assert half.budget_bytes == full.budget_bytes


def test_a_lower_mode_draws_less_than_its_cap_and_gives_more_work_per_joule():
    """AGX Orin, 30 W: 8 W idle + 52 W x 4 of 8 TPCs x (612 of 1300 MHz) squared. Below full power an Orin gave 8 to 35 % more
    tokens per joule when measured."""
    assert device("jetson-agx-orin-64gb@30w").active_watts == pytest.approx(8 + 52 * 0.5 * (612 / 1300) ** 2)
    for name, mode in (
        ("agx-orin-64gb", "50w"),
        ("agx-orin-32gb", "40w"),
        ("orin-nx-16gb", "25w"),
        ("orin-nx-8gb", "20w"),
    ):
        full, lower = device(f"jetson-{name}"), device(f"jetson-{name}@{mode}")
        per_joule = [profile.fp16_flops / profile.active_watts for profile in (full, lower)]
        assert 1.05 < per_joule[1] / per_joule[0] < 1.4
    for profile in DEVICES.values():
        draws = [profile.active_watts, *(profile.in_mode(mode).active_watts for mode, _ in profile.modes)]
        assert draws[0] > max(draws[1:], default=0), profile.name
        assert all(profile.in_mode(mode).active_watts <= chosen.watts for mode, chosen in profile.modes)


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


BOARD = """
compute: {fp32: 1.3 TFLOP/s, fp16: 2600 GFLOP/s, source: data sheet}
bf16: {rate: fp16, source: data sheet}
sustained: {fp32: 0.5, fp16: 0.4, source: assumed}
bandwidth: {peak: 51.2 GB/s, sustained: 0.8, source: data sheet}
memory: {total: 4 GiB, os_idle: 0.8 GB, context: 0.5 GB, source: seen}
power: {idle: 3 W, active: 15 W, source: a meter}
launch: {per_operator: 30 us, source: assumed}
modes: {10w: {cap: 10 W, cores: [2, 4], clock: [600, 1000]}}
"""
LINK = "{down: 50 Mbit/s, up: 10 Mbit/s, latency: 20 ms, source: measured}"


def device_file(folder: Path, board: str = BOARD, link: str = LINK) -> str:
    """A file with one board and one link."""
    lines = "\n".join(f"    {line}" for line in board.strip().splitlines())
    path = folder / "mine.yaml"
    path.write_text(f"devices:\n  my-board:\n{lines}\nnetworks:\n  my-link: {link}\n")
    return str(path)


def test_a_job_names_a_file_with_devices_and_links_of_its_own(tmp_path: Path):
    shares = {"my-board@10w": 0.5, "jetson-nano": 0.5}
    config = FleetConfig(
        num_clients=4, device_files=(device_file(tmp_path),), devices=shares, network="my-link", server="my-board"
    )
    fleet = build_fleet(config, 0)
    board = fleet.devices[0]
    assert (board.fp32_flops, board.fp16_flops) == (1.3e12 * 0.3, 2.6e12 * 0.3)
    assert board.budget_bytes == pytest.approx((4 * 2**30 - 1.3e9) / 1.05)
    assert board.active_watts == pytest.approx(3 + 12 * 0.3 * 0.6)
    assert (fleet.networks[0].up_bps, fleet.server.name) == (10e6, "my-board")
    assert config.outside_device_files() == (str(tmp_path / "mine.yaml"),)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("1.3 TFLOP/s", "1.3", "devices.my-board.compute.fp32: must be a number that is not negative and its unit"),
        ("1.3 TFLOP/s", "-1 TFLOP/s", "devices.my-board.compute.fp32: must be a number"),
        (
            "0.5, fp16: 0.4",
            "1.5, fp16: 0.4",
            "devices.my-board.sustained.fp32: Input should be less than or equal to 1",
        ),
        ("peak:", "peek:", "devices.my-board.bandwidth.peak: Field required"),
        ("rate: fp16", "rate: fp16, rates: fp16", "devices.my-board.bf16.rates: unknown field .did you mean 'rate'"),
        ("4 GiB", "1 GiB", "devices.my-board.memory: total must exceed os_idle and context"),
        ("active: 15 W", "active: 2 W", "devices.my-board.power: active must exceed idle"),
        (", source: a meter", "", "devices.my-board.power.source: Field required"),
        ("[600, 1000]", "[1600, 1000]", "devices.my-board.modes.10w: clock must be"),
        ("idle: 3 W", "idle: 3 W, idle: 4 W", "line [0-9]+: 'idle' stands twice"),
        ("50 Mbit/s", "50 Mbps", "networks.my-link.down: must be a number"),
        ("[600, 1000]", "[600, 1000", "not valid YAML"),
        ("my-board", "jetson-nano", "devices.jetson-nano: there is one of this name already"),
        ("my-board", "my board", "a name has small letters"),
        ("source: measured", "source: {}", "networks.my-link.source: Input should be a valid string"),
    ],
)
def test_a_mistake_in_a_device_file_names_file_entry_field_and_rule(tmp_path: Path, old: str, new: str, said: str):
    path = Path(device_file(tmp_path))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=said) as caught:
        catalogue([str(path)])
    assert (caught.value.field, "mine.yaml" in str(caught.value)) == ("fleet.device_files", True)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe\x00", b"devices: 3", b"? [a]\n: b", None])
def test_a_file_that_holds_no_devices_is_empty_or_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    if content == b"":
        assert catalogue([str(path)]) == built_in()
    else:
        with pytest.raises(UserError, match=r"mine\.yaml"):
            catalogue([str(path)])


def radio_joules(name: str, up_bytes: float, up_bps: float, *, quiet_seconds: float = 0.0, messages: int = 1) -> float:
    """Of one client that sends, and receives nothing."""
    config = FleetConfig(num_clients=1, network=name)
    seconds = {"link_seconds": 8 * up_bytes / up_bps, "quiet_seconds": quiet_seconds}
    radio = build_fleet(config, 0).radio(np.zeros(1, int))
    return radio.joules(0, up_bytes, down_bps=1e6, up_bps=up_bps, num_messages=messages, **seconds).item()


def test_lte_radio_costs_what_the_2012_measurements_say():
    """1 MB up at 5.5 Mbit/s takes 1.4545 s: 3.507 J for the rate, 1.288 W x 1.4545 s = 1.874 J, and 12.3 J until it sleeps."""
    assert radio_joules("lte", 1e6, 5.5e6) == pytest.approx(5.38 + 12.3, abs=0.01)
    assert radio_joules("lte", 0, 5.5e6) == 0
    assert radio_joules("wifi", 1e6, 20e6) == pytest.approx(8 * 0.28317 + 0.13286 * 0.4)


def test_a_radio_draws_no_more_above_thirty_megabits_a_second():
    """Wi-Fi at 200 Mbit/s up: 0.283 W a Mbit/s up to 30, and its base of 0.133 W, for 0.04 s a megabyte."""
    for rate in (30e6, 200e6, 400e6):
        assert radio_joules("wifi", 1e6, rate) == pytest.approx((0.28317 * 30 + 0.13286) * 8e6 / rate)


def test_the_tail_after_a_transfer_ends_with_the_next_one():
    """LTE draws 12.3 J in 11.6 s before it sleeps. Ten messages in 5.8 quiet seconds: half a tail between them, one at the end;
    in an hour: ten tails."""
    alone = radio_joules("lte", 1e6, 5.5e6)
    assert radio_joules("lte", 1e6, 5.5e6, messages=10, quiet_seconds=5.8) == pytest.approx(alone + 12.3 / 2)
    assert radio_joules("lte", 1e6, 5.5e6, messages=10, quiet_seconds=3600) == pytest.approx(alone + 9 * 12.3)


def test_every_network_has_a_source_and_rates_below_its_limit():
    assert {"wifi", "ethernet", "lte", "5g", "3g", "fedadapter"} <= set(NETWORKS)
    for link in NETWORKS.values():
        assert link.source
        assert 0 < link.up_bps <= link.down_bps <= link.max_bps
