"""How DevFT's model grows: blocks and rounds of its stages."""

from __future__ import annotations

from bisect import bisect_right

import pytest

from fleetune.methods.growth import capacities, stage_starts


@pytest.mark.parametrize(
    ("initial", "growth_rate", "num_layers", "expected"),
    [
        (4, 2, 32, [4, 8, 16, 32]),
        (5, 2, 40, [5, 10, 20, 40]),
        (4, 4, 32, [4, 16, 32]),
        (4, 8, 32, [4, 32]),
        (5, 4, 40, [5, 20, 40]),
        (5, 8, 40, [5, 40]),
        (1, 2, 32, [1, 2, 4, 8, 16, 32]),
        (32, 2, 32, [32]),
    ],
)
def test_capacities_of_the_papers_settings(initial: int, growth_rate: int, num_layers: int, expected: list[int]):
    assert capacities(initial, growth_rate, num_layers) == expected


def test_equal_stages_are_the_floor_of_t_s_over_t():
    """Round t of T belongs to stage floor(t S / T), for every T and S with a round to each stage."""
    for num_rounds in range(1, 60):
        for num_stages in range(1, num_rounds + 1):
            starts = stage_starts(num_stages, num_rounds)
            stages = [bisect_right(starts, t) - 1 for t in range(num_rounds)]
            assert stages == [t * num_stages // num_rounds for t in range(num_rounds)]


@pytest.mark.parametrize(
    ("lengths", "num_rounds", "expected"),
    [
        ([5, 5, 10], 20, [0, 5, 10]),
        ([1, 1, 2], 20, [0, 5, 10]),
        ([0.25, 0.25, 0.5], 20, [0, 5, 10]),
        ([0.1, 0.2, 0.7], 10, [0, 1, 3]),
        ([1, 2], 4, [0, 2]),  # 4/3 of a round: the next stage begins with the round after it
        ([7], 3, [0]),
    ],
)
def test_lengths_are_rounds_or_shares(lengths: list[float], num_rounds: int, expected: list[int]):
    assert stage_starts(len(lengths), num_rounds, lengths) == expected
