"""Quantities are told in one way everywhere: powers of 1000, a unit that suits the value."""

from __future__ import annotations

import pytest

from fleetune.units import duration, energy, percent, readable, scale_of, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1_536, "1.54 kB"),
        (111_411_200, "111 MB"),
        (4.62e9, "4.62 GB"),
        (2.5e15, "2,500 TB"),
    ],
)
def test_bytes(num_bytes: float, text: str):
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.31, "4.3 s"),
        (43, "43 s"),
        (92, "1 m 32 s"),
        (7_200, "2 h 00 m"),
        (12_000, "3 h 20 m"),
        (200_000, "2 d 7 h"),
    ],
)
def test_seconds(seconds: float, text: str):
    assert duration(seconds) == readable(seconds, "seconds") == text


def test_what_is_not_known_is_a_dash():
    assert readable(None, "joules") == energy(float("nan")) == size(None) == percent(None) == "–"
    assert (energy(3_361), percent(0.776)) == ("3.36 kJ", "77.6 %")


def test_an_axis_has_the_unit_of_its_largest_value():
    """Of a minute, seconds read better up to two."""
    assert scale_of(0.0, "bytes") == (1.0, "B")
    assert scale_of(4e9, "bytes") == (1e9, "GB")
    assert (scale_of(119, "seconds"), scale_of(120, "seconds")) == ((1.0, "s"), (60.0, "min"))
