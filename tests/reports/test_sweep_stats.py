"""The statistics of a sweep, on numbers small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from fleetune.errors import UserError
from fleetune.reports.sweep_results import configuration_labels, parse_budgets, parse_targets
from fleetune.reports.sweep_stats import (
    SCORES,
    budgets_from,
    cost_to_target,
    effect,
    heat_map,
    mean_curve,
    over_seeds,
    pareto_front,
    quality_under_budget,
    ranking,
    robustness,
    score_of,
    targets_from,
)

ACCURACY, _, TRAIN_LOSS = SCORES


def curve(trial: int, configuration: str, *rows: tuple[int, float, float | None]) -> pd.DataFrame:
    """(round, bytes sent since the start, accuracy) of one trial."""
    table = pd.DataFrame(rows, columns=["round", "uplink_bytes", "eval_accuracy"]).astype(float)
    return table.assign(trial=trial, configuration=configuration)


# Trial 0 sends 100 bytes a round, trial 1 half of it; round 2 of trial 0 is not evaluated.
A = curve(0, "a", (0, 0, 0.2), (1, 100, 0.5), (2, 200, None), (3, 300, 0.4), (4, 400, 0.8))
B = curve(1, "b", (0, 0, 0.2), (1, 50, 0.3), (2, 100, 0.6), (3, 150, 0.6))
CURVES = pd.concat([A, B], ignore_index=True)


def test_ranking_over_seeds():
    """a: 0.5 and 0.7, mean 0.6, deviation √(0.1² + 0.1²) = 0.1414; b: one trial of 0.65; c: no score, no rank."""
    trials = pd.DataFrame(
        {
            "configuration": ["a", "a", "b", "c"],
            "eval_accuracy": [0.5, 0.7, 0.65, math.nan],
            "uplink_bytes": [10.0, 30.0, 5.0, 1.0],
        }
    )
    table = ranking(trials, ACCURACY, ["uplink_bytes"])
    assert list(table.index) == ["b", "a"]
    assert list(table["rank"]) == [1, 2]
    assert table["score"].to_dict() == pytest.approx({"a": 0.6, "b": 0.65})
    assert table.loc["a", "spread"] == pytest.approx(math.sqrt(0.02))
    assert math.isnan(table.loc["b", "spread"])
    assert table["uplink_bytes"].to_dict() == {"a": 20.0, "b": 5.0}
    assert list(ranking(trials.rename(columns={"eval_accuracy": "train_loss"}), TRAIN_LOSS, []).index) == ["a", "b"]


def test_the_score_is_what_was_measured_and_asked_for():
    """Without evaluation the training loss; what the sweep was to be best in, where it is known."""
    measured = pd.DataFrame({"eval_accuracy": [0.5], "eval_loss": [1.0], "train_loss": [2.0]})
    assert score_of(measured).column == "eval_accuracy"
    assert score_of(measured, prefer="eval_loss").column == "eval_loss"
    assert score_of(measured, prefer="uplink_bytes").column == "eval_accuracy"
    assert score_of(measured.assign(eval_accuracy=None, eval_loss=None), prefer="eval_loss").column == "train_loss"


def test_mean_curve_keeps_the_rounds_that_all_seeds_have():
    """Round 1 of two seeds: 0.4 after 10 bytes and 0.6 after 30; round 2 is known of one seed only."""
    seeds = pd.concat([curve(0, "a", (1, 10, 0.4), (2, 20, 0.9)), curve(1, "a", (1, 30, 0.6), (2, 60, None))])
    table = mean_curve(seeds, "eval_accuracy", "uplink_bytes")
    assert table.to_dict("records") == [
        {"configuration": "a", "round": 1.0, "x": 20.0, "mean": 0.5, "low": 0.4, "high": 0.6}
    ]


def test_pareto_front():
    """(1, 0.5) is cheapest, (3, 0.9) best, (2, 0.7) between them; (3, 0.8), (2, 0.6) and (4, 0.9) are beaten."""
    cost, score = [1, 2, 3, 3, 2, 4, math.nan], [0.5, 0.7, 0.9, 0.8, 0.6, 0.9, 1.0]
    assert pareto_front(cost, score).tolist() == [True, True, True, False, False, False, False]
    assert pareto_front(cost, -np.array(score), higher_is_better=False).tolist()[:4] == [True, True, True, False]
    assert pareto_front([1, 1], [2, 2]).tolist() == [True, True]


def test_quality_under_a_budget():
    """99 bytes buy nothing of a (still untrained: 0.2) and round 1 of b; 300 bytes buy round 1 of a, better than its
    round 3; 1000 bytes buy all.
    """
    table = quality_under_budget(CURVES, ACCURACY, "uplink_bytes", [99, 300, 1000])
    assert table.loc[0].tolist() == [0.2, 0.5, 0.8]
    assert table.loc[1].tolist() == [0.3, 0.6, 0.6]
    untrained_unknown = CURVES[CURVES["round"] > 0]
    assert math.isnan(quality_under_budget(untrained_unknown, ACCURACY, "uplink_bytes", [99]).loc[0, 99])


def test_quality_under_a_budget_of_a_loss_is_the_lowest():
    losses = CURVES.rename(columns={"eval_accuracy": "train_loss"})
    assert quality_under_budget(losses, TRAIN_LOSS, "uplink_bytes", [1000]).loc[0, 1000] == 0.2


def test_cost_to_a_target():
    """a first reaches 0.4 in round 1 and 0.8 in round 4; b reaches 0.6 in round 2, and 0.8 never."""
    table = cost_to_target(CURVES, ACCURACY, "uplink_bytes", [0.4, 0.6, 0.8])
    assert table.loc[0].tolist() == [100, 400, 400]
    assert table.loc[1].tolist()[:2] == [100, 100]
    assert math.isnan(table.loc[1, 0.8])


def test_means_over_the_seeds_that_reached_a_target():
    """Of two seeds one reached it, after 400 bytes."""
    values = pd.DataFrame({0.8: [400.0, math.nan]}, index=pd.Index([0, 1], name="trial"))
    means, counts = over_seeds(values, pd.Series({0: "a", 1: "a", 2: "b"}))
    assert means.loc["a", 0.8] == 400
    assert counts.loc["a", 0.8] == 1


def test_targets_lie_between_start_and_best():
    """From 0.2 to 0.8: 0.5, 0.65 and 0.74. A loss that falls from 2 to 1: 1.5, 1.25 and 1.1. Nothing got better: none."""
    assert targets_from(CURVES, ACCURACY) == [0.5, 0.65, 0.74]
    losses = pd.DataFrame({"round": [1, 2], "train_loss": [2.0, 1.0]})
    assert targets_from(losses, TRAIN_LOSS) == [1.5, 1.25, 1.1]
    assert targets_from(CURVES[CURVES["round"] == 0], ACCURACY) == []


def test_budgets_in_equal_ratios():
    """From 50 bytes (left out) to 400 in three steps of 2; the last holds all. 7 h 50 min 4 s are rounded up to 7.9 h."""
    assert budgets_from(CURVES, ACCURACY, "uplink_bytes", "bytes", count=3) == [100, 200, 400]
    long = CURVES.assign(sim_seconds=28_204.0)
    assert budgets_from(long, ACCURACY, "sim_seconds", "seconds") == [pytest.approx(7.9 * 3600)]


def test_robustness_is_relative_to_the_least_drop_out():
    """devft falls from 0.8 to 0.6 (two seeds: 0.5 and 0.7), a quarter; fedit from 0.5 to 0.45, a tenth."""
    trials = pd.DataFrame(
        {
            "fleet.dropout": [0.3, 0.0, 0.3, 0.0, 0.3],
            "eval_accuracy": [0.5, 0.8, 0.7, 0.5, 0.45],
        }
    )
    rest = pd.Series(["devft", "devft", "devft", "fedit", "fedit"])
    means, change = robustness(trials, ACCURACY, "fleet.dropout", rest)
    assert list(means.columns) == [0.0, 0.3]
    assert means.loc["devft"].tolist() == pytest.approx([0.8, 0.6])
    assert change.loc["devft"].tolist() == pytest.approx([0, -0.25])
    assert change.loc["fedit"].tolist() == pytest.approx([0, -0.1])
    _, change = robustness(trials, ACCURACY, "fleet.dropout", rest, calm_is_low=False)
    assert change.loc["devft"].to_dict() == pytest.approx({0.3: 0, 0.0: 1 / 3})


def test_effect_and_heat_map():
    """growth 2: 0.4 and 0.6 in devft; growth 4: 0.8; the pair (4, 1) was not tried."""
    trials = pd.DataFrame({"growth": [2, 2, 4], "cap": [1, 2, 2], "eval_accuracy": [0.4, 0.6, 0.8], "method": "devft"})
    table = effect(trials, ACCURACY, "growth", trials["method"])
    assert table["mean"].tolist() == [0.5, 0.8]
    assert table["spread"].tolist() == pytest.approx([math.sqrt(0.02), 0.0])
    heat = heat_map(trials, ACCURACY, "growth", "cap")
    assert heat.loc[2].tolist() == [0.4, 0.6]
    assert math.isnan(heat.loc[4, 1])


def test_labels_tell_configurations_apart():
    """The method first; two fields that end alike carry their section; what is not set is not told."""
    fields = ["model.lora.rank", "method.rank", "method.name"]
    trials = pd.DataFrame({fields[0]: [8.0, 8.0], fields[1]: [2.5, math.nan], fields[2]: ["fedit", None]})
    assert configuration_labels(trials, fields).tolist() == ["fedit · lora.rank 8 · method.rank 2.5", "lora.rank 8"]
    assert configuration_labels(trials, []).tolist() == ["base job", "base job"]


def test_budgets_and_targets_as_given():
    """The unit says which cost: 10 MB = 10⁷ bytes, 2 h = 7,200 s, 0.5 kJ = 500 J."""
    assert parse_budgets(["10MB", "1 kb", "2h", "0.5 kJ"]) == {
        "uplink_bytes": [1e3, 1e7],
        "sim_seconds": [7200.0],
        "energy_joules": [500.0],
    }
    assert parse_targets(["60%", "0.5"]) == [0.6, 0.5]


@pytest.mark.parametrize("text", ["10", "10 apples", "-3MB", "0h", "1.2.3s"])
def test_a_budget_needs_a_number_and_a_unit(text: str):
    with pytest.raises(UserError, match="positive number with the unit"):
        parse_budgets([text])


def test_a_target_is_a_number():
    with pytest.raises(UserError, match="a target is a number"):
        parse_targets(["high"])
