"""Verdicts on claims, against numbers that are worked out by hand.

The t quantiles at 97.5 % are 12.706 for two seeds, 4.3027 for three and 2.7764 for five. An interval's half length is the
quantile times the sample standard deviation over the square root of the number of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.claims.statistics import by_seed, interval, slopes
from fleetune.claims.verdicts import Verdict, summary, verdicts_of
from support.synthetic_sweeps import make_study

Result = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]

METHODS = {"method.name": ["devft", "fedit"]}
DEVFT, FEDIT = {"method.name": "devft"}, {"method.name": "fedit"}
RATES = {"method.growth_rate": [2, 4, 8]}
NOISE = [0.0, 0.1, -0.2, 0.3, 0.05]
"""What a seed adds to every trial of it; pairs take it away."""


def verdict_of(workspace: Path, grid: Any, claim: Any, result: Result, *, seeds: int = 5) -> Verdict:
    """The verdict on one claim from a table with these results."""
    (found,) = verdicts_of(make_study(workspace, grid, [claim], result, seeds=range(seeds)))
    return found


def accuracy_of(gains: list[float]) -> Result:
    """devft's accuracy is above fedit's by so much with each seed."""

    def result(trial: Mapping[str, Any]) -> Mapping[str, Any]:
        gain = gains[trial["seed"]] if trial["method.name"] == "devft" else 0.0
        return {"eval_accuracy": 0.5 + NOISE[trial["seed"]] + gain}

    return result


def at_rates(values: dict[int, float], jitter: list[float] | None = None) -> Result:
    """An accuracy for each growth rate, and a seed's noise on top; ``jitter`` is what a seed adds at the last rate alone."""

    def result(trial: Mapping[str, Any]) -> Mapping[str, Any]:
        extra = jitter[trial["seed"]] if jitter and trial["method.growth_rate"] == max(values) else 0.0
        return {"eval_accuracy": values[trial["method.growth_rate"]] + NOISE[trial["seed"]] + extra}

    return result


# -- better ------------------------------------------------------------------------------------------------------------
BETTER = {"better": DEVFT, "than": FEDIT, "in": "eval/accuracy", "source": "table 1"}


def test_a_difference_whose_interval_is_above_zero_holds(tmp_path: Path):
    """Differences .01, .02, .03, .02, .02: mean .02, s = sqrt(.0002 / 4) = .0070711, half 2.7764 · s / sqrt(5) = .0087798."""
    found = verdict_of(tmp_path, METHODS, BETTER, accuracy_of([0.01, 0.02, 0.03, 0.02, 0.02]))
    assert found.verdict == "holds"
    assert found.mean == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx((0.0112202, 0.0287798), abs=1e-6)
    assert found.smallest_decidable == pytest.approx(0.0087798, abs=1e-6)
    assert (found.num_seeds, found.num_pairs, found.num_left_out, found.remark) == (5, 5, 0, None)
    assert found.line() == (
        "holds: devft is better than fedit in eval/accuracy (table 1): +2.0 pp [+1.1 pp, +2.9 pp], 5 seed(s)"
    )


def test_the_other_way_round_it_is_reversed(tmp_path: Path):
    """The same differences with the other sign."""
    found = verdict_of(tmp_path, METHODS, BETTER, accuracy_of([-0.01, -0.02, -0.03, -0.02, -0.02]))
    assert (found.verdict, found.mean) == ("reversed", pytest.approx(-0.02))


def test_few_seeds_decide_little_and_it_is_said(tmp_path: Path):
    """Differences .01, .02, .03: mean .02, s = .01, half 4.3027 · .01 / sqrt(3) = .0248416, so the interval holds zero."""
    found = verdict_of(tmp_path, METHODS, BETTER, accuracy_of([0.01, 0.02, 0.03]), seeds=3)
    assert found.verdict == "not decided"
    assert (found.low, found.high) == pytest.approx((-0.0048416, 0.0448416), abs=1e-6)
    assert found.smallest_decidable == pytest.approx(0.0248416, abs=1e-6)
    assert found.remark == "only 3 seeds"


def test_of_losses_and_costs_less_is_better(tmp_path: Path):
    """A loss that is lower by 0.1 with every seed; the difference is shown as it is."""
    claim = {**BETTER, "in": "eval/loss"}
    found = verdict_of(tmp_path, METHODS, claim, lambda t: {"eval_loss": 1.0 - 0.1 * (t["method.name"] == "devft")})
    assert (found.verdict, found.mean) == ("holds", pytest.approx(-0.1))
    assert found.mean_text() == "-0.1"


def test_no_difference_at_all_decides_nothing(tmp_path: Path):
    """The interval is the point zero."""
    found = verdict_of(tmp_path, METHODS, BETTER, accuracy_of([0.0] * 5))
    assert (found.verdict, found.low, found.high) == ("not decided", 0.0, 0.0)


def test_the_pairs_of_a_seed_become_one_number(tmp_path: Path):
    """Two learning rates, where devft gains .03 and .01 with every seed: five times .02, and an interval of no length.

    Ten pairs taken as independent would have s = .0105 instead, though the seeds agree to the last digit.
    """
    grid = {**METHODS, "local.learning_rate": [1e-3, 1e-2]}

    def result(trial: Mapping[str, Any]) -> Mapping[str, Any]:
        gain = (0.03 if trial["local.learning_rate"] == 1e-3 else 0.01) * (trial["method.name"] == "devft")
        return {"eval_accuracy": 0.5 + gain + NOISE[trial["seed"]]}

    found = verdict_of(tmp_path, grid, BETTER, result)
    assert (found.verdict, found.mean) == ("holds", pytest.approx(0.02))
    assert found.smallest_decidable == pytest.approx(0.0, abs=1e-12)
    assert (found.num_seeds, found.num_pairs) == (5, 10)


def test_for_chooses_cells(tmp_path: Path):
    """At the second learning rate alone devft loses .01."""
    grid = {**METHODS, "local.learning_rate": [1e-3, 1e-2]}

    def result(trial: Mapping[str, Any]) -> Mapping[str, Any]:
        gain = (0.03 if trial["local.learning_rate"] == 1e-3 else -0.01) * (trial["method.name"] == "devft")
        return {"eval_accuracy": 0.5 + gain}

    claim = {**BETTER, "for": {"local.learning_rate": 1e-2}}
    found = verdict_of(tmp_path, grid, claim, result)
    assert (found.verdict, found.mean, found.num_pairs) == ("reversed", pytest.approx(-0.01), 5)


# -- trends ------------------------------------------------------------------------------------------------------------
FALLS = {"falls": "eval/accuracy", "over": "method.growth_rate"}
RISES = {"rises": "eval/accuracy", "over": "method.growth_rate"}


def test_a_trend_is_the_slope_over_the_values_in_their_order(tmp_path: Path):
    """0.6, 0.5, 0.46: slope (0.46 - 0.6) / 2 = -0.07 from one value to the next, with every seed alike."""
    found = verdict_of(tmp_path, RATES, FALLS, at_rates({2: 0.6, 4: 0.5, 8: 0.46}))
    assert (found.verdict, found.mean) == ("holds", pytest.approx(-0.07))
    assert found.quantity == "change per value"


def test_what_falls_does_not_rise(tmp_path: Path):
    found = verdict_of(tmp_path, RATES, RISES, at_rates({2: 0.6, 4: 0.5, 8: 0.46}))
    assert (found.verdict, found.mean) == ("reversed", pytest.approx(-0.07))


def test_a_line_is_no_summary_of_what_falls_and_rises(tmp_path: Path):
    """0.9, 0.5, 0.6: the slope is -0.15, but from 4 to 8 every seed rises by 0.1."""
    for name, claim in (("falls", FALLS), ("rises", RISES)):
        found = verdict_of(tmp_path / name, RATES, claim, at_rates({2: 0.9, 4: 0.5, 8: 0.6}))
        assert (found.verdict, found.mean) == ("not decided", pytest.approx(-0.15))
        assert found.remark == "not monotone: it rises from growth_rate 4 to growth_rate 8"


def test_a_step_against_the_trend_that_is_noise_does_not_count(tmp_path: Path):
    """0.9, 0.5, 0.5, and at the last rate seeds add .02, -.01, .03, -.02, -.01: the step is not decided, the slope is.

    Slopes are -0.2 + half of these: mean -0.199, s = .5 · sqrt(.00188 / 4) = .01084, half 2.7764 · s / sqrt(5) = .01346.
    """
    found = verdict_of(tmp_path, RATES, FALLS, at_rates({2: 0.9, 4: 0.5, 8: 0.5}, [0.02, -0.01, 0.03, -0.02, -0.01]))
    assert (found.verdict, found.mean) == ("holds", pytest.approx(-0.199))
    assert found.smallest_decidable == pytest.approx(0.01346, abs=1e-5)


# -- peaks -------------------------------------------------------------------------------------------------------------
PEAK = {"peaks_at": {"method.growth_rate": 4}, "in": "eval/accuracy"}


def test_a_peak_is_above_every_other_value(tmp_path: Path):
    """0.5, 0.6, 0.57: the closest rival is 8, by 0.03."""
    found = verdict_of(tmp_path, RATES, PEAK, at_rates({2: 0.5, 4: 0.6, 8: 0.57}))
    assert (found.verdict, found.mean, found.remark) == ("holds", pytest.approx(0.03), "beside growth_rate 8")


def test_one_value_above_it_reverses_it(tmp_path: Path):
    found = verdict_of(tmp_path, RATES, PEAK, at_rates({2: 0.5, 4: 0.6, 8: 0.62}))
    assert (found.verdict, found.mean, found.remark) == ("reversed", pytest.approx(-0.02), "beside growth_rate 8")


def test_a_rival_within_the_noise_leaves_it_open(tmp_path: Path):
    """Differences to 8: -.01, .02, -.03, .02, .05; mean .01, s = sqrt(.0038 / 4) = .03082, half .03827."""
    found = verdict_of(tmp_path, RATES, PEAK, at_rates({2: 0.5, 4: 0.6, 8: 0.6}, [0.01, -0.02, 0.03, -0.02, -0.05]))
    assert (found.verdict, found.mean) == ("not decided", pytest.approx(0.01))
    assert found.smallest_decidable == pytest.approx(0.03827, abs=1e-5)


def test_a_rival_that_was_not_measured_leaves_it_open_unless_another_one_is_above(tmp_path: Path):
    """All trials at 8 failed."""
    for name, low, expected in (("below", 0.5, "not decided"), ("above", 0.7, "reversed")):
        known = at_rates({2: low, 4: 0.6, 8: 0.0})
        found = verdict_of(
            tmp_path / name, RATES, PEAK, lambda t, k=known: None if t["method.growth_rate"] == 8 else k(t)
        )
        assert (found.verdict, found.num_left_out) == (expected, 5)


# -- ratios ------------------------------------------------------------------------------------------------------------
def ratio(value: float, within: float) -> dict[str, Any]:
    return {"ratio": {"of": DEVFT, "to": FEDIT, "in": "uplink_bytes", "is": value, "within": within}}


def bytes_of(fractions: list[float]) -> Result:
    """devft sends this part of fedit's bytes with each seed."""
    return lambda t: {"uplink_bytes": 1e6 * (fractions[t["seed"]] if t["method.name"] == "devft" else 1.0)}


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [(ratio(0.5, 0.1), "holds"), (ratio(0.6, 0.1), "holds"), (ratio(0.7, 0.1), "reversed"), (ratio(0.5, 0.0), "holds")],
)
def test_a_cost_that_no_seed_changes_is_within_the_tolerance_or_not(claim: Any, verdict: str, tmp_path: Path):
    """The ratio is 0.5; the tolerance's ends belong to it."""
    found = verdict_of(tmp_path, METHODS, claim, bytes_of([0.5] * 5))
    assert (found.verdict, found.mean, found.quantity) == (verdict, pytest.approx(0.5), "ratio")


def test_ratios_are_averaged_as_ratios(tmp_path: Path):
    """0.4 and 0.6 with two seeds: geometric mean sqrt(0.24) = 0.4899; ln 1.5 / sqrt(2) = .28671 is s of the logarithms.

    Half of their interval is 12.7062 · .28671 / sqrt(2) = 2.5760, so the ends are .4899 / 13.144 and .4899 · 13.144.
    """
    found = verdict_of(tmp_path, METHODS, ratio(0.5, 0.1), bytes_of([0.4, 0.6]), seeds=2)
    assert (found.verdict, found.mean) == ("not decided", pytest.approx(math.sqrt(0.24)))
    assert (found.low, found.high) == pytest.approx((0.03727, 6.439), rel=1e-3)


def test_a_cost_of_zero_has_no_ratio(tmp_path: Path):
    found = verdict_of(tmp_path, METHODS, ratio(0.5, 0.1), bytes_of([0.5, 0.0, 0.5]), seeds=3)
    assert (found.verdict, found.num_pairs, found.num_seeds) == ("holds", 2, 2)


# -- trials that are missing -------------------------------------------------------------------------------------------
def test_trials_that_failed_are_left_out_and_counted(tmp_path: Path):
    """Of devft with seed 1; without it the differences are .01, .03, .02, .02."""
    known = accuracy_of([0.01, 0.02, 0.03, 0.02, 0.02])
    found = verdict_of(
        tmp_path, METHODS, BETTER, lambda t: None if (t["seed"], t["method.name"]) == (1, "devft") else known(t)
    )
    assert (found.num_pairs, found.num_seeds, found.num_left_out) == (4, 4, 1)
    assert found.mean == pytest.approx(0.02)
    assert found.line().endswith("4 seed(s), 1 trial(s) left out; only 4 seeds")


def test_a_trial_that_was_stopped_early_or_has_no_value_is_left_out(tmp_path: Path):
    """It has spent less and learnt less than its partner."""

    def result(trial: Mapping[str, Any]) -> Mapping[str, Any]:
        status = "stopped" if trial["seed"] == 0 else "finished"
        return {"status": status, "eval_accuracy": float("nan") if trial["seed"] == 1 else 0.5}

    found = verdict_of(tmp_path, METHODS, BETTER, result)
    assert (found.num_pairs, found.num_left_out) == (3, 4)


def test_without_two_seeds_nothing_is_decided(tmp_path: Path):
    """One pair is left, and no interval; then none."""
    for left in (1, 0):
        claim_result: Result = lambda t, left=left: {"eval_accuracy": 0.5} if t["seed"] < left else None  # noqa: E731
        found = verdict_of(tmp_path / str(left), METHODS, BETTER, claim_result)
        assert (found.verdict, found.mean, found.num_seeds) == ("not decided", None, left)
        assert found.remark == "an interval needs two seeds with all trials of a pair"


def test_a_method_with_its_settings_is_found_in_the_table(tmp_path: Path):
    """The grid sets a mapping, the table has a column for each of its fields, empty for the method that lacks it."""
    grid = {"method": [{"name": "fedit"}, {"name": "devft", "initial_capacity": 2}]}
    found = verdict_of(tmp_path, grid, BETTER, accuracy_of([0.01, 0.02, 0.03, 0.02, 0.02]))
    assert (found.verdict, found.num_pairs) == ("holds", 5)


def test_a_sweep_without_claims_has_no_verdicts(tmp_path: Path):
    assert verdicts_of(make_study(tmp_path, METHODS, [], accuracy_of([0.0] * 3))) == []


# -- statistics --------------------------------------------------------------------------------------------------------
def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    """Of 4,000 draws of five normal seeds 95 % ± 1 % hold it (three standard deviations of the count are 1.03 %)."""
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    found = [interval(draw) for draw in draws]
    share = np.mean([each is not None and each.low <= 3.0 <= each.high for each in found])
    assert share == pytest.approx(0.95, abs=0.0104)


def test_values_of_a_seed_are_averaged_over_what_it_has():
    values = np.array([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]])
    assert by_seed(values)[:2].tolist() == [2.0, 4.0]
    assert np.isnan(by_seed(values)[2])


def test_a_slope_is_that_of_the_least_squares_line():
    """Against numpy's fit of a line over 0, 1, 2, 3."""
    values = np.random.default_rng(1).normal(size=(1, 4, 1))
    expected = np.polyfit(np.arange(4), values[0, :, 0], 1)[0]
    assert slopes(values)[0, 0] == pytest.approx(expected)


def test_verdicts_are_counted_in_their_order():
    assert summary(["reversed", "holds", "holds"]) == "holds 2, reversed 1"
