"""The fleet: exact shares, draws with addresses, and a few bytes per registered client."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from fleetune.fleet.fleet import FleetConfig, build_fleet, counts_of

MIXED = {"jetson-nano": 0.5, "jetson-orin-nano-8gb": 0.3, "jetson-agx-orin-64gb": 0.2}


def fleet_of(num_clients: int = 20, seed: int = 0, **fields):
    return build_fleet(FleetConfig(num_clients=num_clients, **fields), seed)


def test_shares_are_exact_by_largest_remainder():
    """7 clients: 3.5, 2.1 and 1.4 give 3, 2, 1, and the seventh goes to the largest remainder, the first."""
    assert counts_of(MIXED, 7) == [4, 2, 1]
    assert counts_of({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 2) == [1, 1, 0]
    fleet = fleet_of(10, devices=MIXED)
    assert np.bincount(fleet.device_index).tolist() == [5, 3, 2]
    assert fleet.device_names == list(MIXED)


def test_the_deal_depends_on_the_seed_alone():
    assert (fleet_of(50, seed=1).device_index == fleet_of(50, seed=1).device_index).all()
    assert (fleet_of(50, seed=1).device_index != fleet_of(50, seed=2).device_index).any()
    fleet = fleet_of(4, devices={"jetson-tx2-nx": 1.0})
    assert fleet.profile(3).name == "jetson-tx2-nx"
    assert fleet.network(3).name == "wifi"


def test_a_clients_link_in_a_round_does_not_depend_on_who_else_was_sampled():
    fleet = fleet_of(100)
    alone = fleet.draw_rates(7, 3, np.array([42]))
    among = fleet.draw_rates(7, 3, np.array([5, 42, 99]))
    assert [column[0] for column in alone] == [column[1] for column in among]
    assert fleet.draw_rates(7, 4, np.array([42]))[0] != alone[0]
    assert among[1] / among[0] == pytest.approx(np.full(3, 26.3 / 34.5))  # one draw for both directions


def test_rates_spread_around_their_median_up_to_the_limit():
    """Lognormal: half of the draws above 34.5 Mbit/s, and a standard deviation of the logarithm of 0.5."""
    down_bps, _, latency = fleet_of(10_000).draw_rates(0, 0, np.arange(10_000))
    assert np.mean(down_bps > 34.5e6) == pytest.approx(0.5, abs=0.02)
    assert np.std(np.log(down_bps)) == pytest.approx(0.5, abs=0.02)
    assert set(latency) == {0.005}
    fast, _, _ = fleet_of(10_000, network="5g").draw_rates(0, 0, np.arange(10_000))
    assert fast.max() == 250e6
    fixed, _, _ = fleet_of(5, network="fedadapter").draw_rates(0, 0, np.arange(5))
    assert set(fixed) == {8e6}


def test_mixed_networks_are_dealt_apart_from_devices():
    fleet = fleet_of(1000, network={"wifi": 0.6, "lte": 0.4}, devices={"jetson-nano": 0.5, "jetson-tx2": 0.5})
    assert np.bincount(fleet.network_index).tolist() == [600, 400]
    both = np.mean((fleet.network_index == 1) & (fleet.device_index == 1))
    assert both == pytest.approx(0.2, abs=0.05)  # independent: 0.4 x 0.5
    radio = fleet.radio(np.arange(1000))
    assert sorted(set(radio.radio_watts)) == [0.13286, 1.28804]


def test_dropout_is_a_probability_per_client_and_round():
    fleet = fleet_of(10_000, dropout=0.1)
    ids = np.arange(10_000)
    first, second = fleet.dropped(0, 0, ids), fleet.dropped(0, 1, ids)
    assert first.mean() == pytest.approx(0.1, abs=0.01)
    assert (first & second).mean() == pytest.approx(0.01, abs=0.005)
    assert (fleet.dropped(0, 0, ids[500:600]) == first[500:600]).all()
    assert not fleet_of(100).dropped(0, 0, np.arange(100)).any()


def test_ten_thousand_clients_take_forty_kilobytes():
    fleet = fleet_of(10_000)
    assert fleet.device_index.nbytes + fleet.network_index.nbytes == 40_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": {"jetson-nano": 0.5}}, "must sum to 1 .they sum to 0.5"),
        ({"devices": {"jetson-nano": 1.5, "jetson-tx2": -0.5}}, "not negative"),
        ({"devices": {"jetson-nanoo": 1.0}}, "did you mean 'jetson-nano'"),
        ({"network": "ethernett"}, "did you mean 'ethernet'"),
        ({"network": {"wifi": 0.5, "lte": 0.4}}, "must sum to 1"),
        ({"num_clients": 0}, "greater than 0"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_a_wrong_fleet_is_refused_with_the_rule(fields, message):
    with pytest.raises(ValidationError, match=message):
        FleetConfig(**fields)
