"""The statistics of a sweep: ranking, mean curves, Pareto front, and the three protocols of EdgeFlowerTune.

Pure functions from tables to tables. ``trials`` has a row per trial, ``curves`` a row per trial and evaluated
or finished round, costs summed since the start; both carry ``configuration``, the label that trials which
differ in their seed only have in common.

The protocols (quality under a budget, cost to a target, robustness) follow the idea of Geng, Lu, Zhao, Gao,
Lane and Luo, "EdgeFlowerTune: Evaluating Federated LLM Fine-Tuning Under Realistic Edge System Constraints",
2026, https://arxiv.org/abs/2605.08636. What is measured there on boards and phones is simulated here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from fleetune.columns import UNTRAINED
from fleetune.units import scale_of

# Fractions of the way from the untrained model to the best score at which targets lie.
TARGET_FRACTIONS = (0.5, 0.75, 0.9)
NUM_BUDGETS = 4


@dataclass(frozen=True)
class Score:
    """What trials are ranked by: a column, its name for people, its direction, and whether it is a fraction of 1."""

    column: str
    title: str
    higher_is_better: bool
    is_fraction: bool

    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.higher_is_better else -1


SCORES = (
    Score("eval_accuracy", "accuracy", higher_is_better=True, is_fraction=True),
    Score("eval_loss", "evaluation loss", higher_is_better=False, is_fraction=False),
    Score("train_loss", "training loss", higher_is_better=False, is_fraction=False),
)


def score_of(trials: pd.DataFrame, prefer: str | None = None) -> Score:
    """The preferred score where one trial at least has it, else accuracy, else evaluation loss, else training loss."""
    ordered = sorted(SCORES, key=lambda score: score.column != prefer)
    return next((score for score in ordered if trials[score.column].notna().any()), SCORES[-1])


def ranking(trials: pd.DataFrame, score: Score, means: Sequence[str]) -> pd.DataFrame:
    """One row per configuration, the best mean score first (index ``configuration``).

    ``rank`` from 1, ``num_trials``, ``score``, ``spread`` (sample standard deviation over seeds, NaN for one
    trial), and the mean of each column in ``means``. Trials without a score do not count.
    """
    groups = trials[trials[score.column].notna()].groupby("configuration", sort=False)
    table = pd.DataFrame(
        {
            "num_trials": groups.size(),
            "score": groups[score.column].mean(),
            "spread": groups[score.column].std(ddof=1),
            **{name: groups[name].mean() for name in means},
        }
    )
    table = table.sort_values("score", ascending=not score.higher_is_better, kind="stable")
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def mean_curve(curves: pd.DataFrame, column: str, over: str) -> pd.DataFrame:
    """A configuration's mean line: ``configuration, x, mean, low, high``, a row per round that all its trials have.

    ``x`` is the mean of ``over`` (rounds, seconds, bytes) at that round, ``low`` and ``high`` the range of
    ``column`` over seeds. A round that some seed has not evaluated is left out: the mean would jump.
    """
    known = curves[curves[column].notna()]
    rows = known.groupby(["configuration", "round"], sort=True).agg(
        x=(over, "mean"), mean=(column, "mean"), low=(column, "min"), high=(column, "max"), count=(column, "size")
    )
    num_trials = known.groupby("configuration")["trial"].nunique()
    rows = rows.reset_index()
    return rows[rows["count"] == rows["configuration"].map(num_trials)].drop(columns="count")


def pareto_front(costs: ArrayLike, scores: ArrayLike, *, higher_is_better: bool = True) -> np.ndarray:
    """Which of N points no other beats: none is as cheap and as good, and cheaper or better. Bool ``[N]``.

    Points without cost or score are never on the front; equal points are on it together.
    """
    cost = np.asarray(costs, dtype=float)
    score = np.asarray(scores, dtype=float) * (1 if higher_is_better else -1)
    front = np.isfinite(cost) & np.isfinite(score)
    for i in np.flatnonzero(front):
        as_good = front & (cost <= cost[i]) & (score >= score[i])
        if (as_good & ((cost < cost[i]) | (score > score[i]))).any():
            front[i] = False
    return front


# ---------------------------------------------------------------------- quality under a budget, cost to a target


def quality_under_budget(curves: pd.DataFrame, score: Score, cost: str, budgets: Sequence[float]) -> pd.DataFrame:
    """The best score a trial had reached when its cost came to each budget: index ``trial``, columns ``budgets``.

    The untrained model, where it was evaluated, costs nothing and counts. NaN: nothing evaluated by then.
    """
    rows = {}
    for trial, costs, best in _best_so_far(curves, score, cost):
        place = np.searchsorted(costs, np.asarray(budgets, dtype=float), side="right") - 1
        rows[trial] = [float(best[i]) if i >= 0 else math.nan for i in place]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(budgets)).rename_axis("trial")


def cost_to_target(curves: pd.DataFrame, score: Score, cost: str, targets: Sequence[float]) -> pd.DataFrame:
    """What a trial had cost at the first evaluation that reached each target: index ``trial``, columns ``targets``.

    NaN: not reached.
    """
    rows = {}
    for trial, costs, best in _best_so_far(curves, score, cost):
        reached = [np.flatnonzero(score.sign() * (best - target) >= 0) for target in targets]
        rows[trial] = [float(costs[i[0]]) if len(i) else math.nan for i in reached]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(targets)).rename_axis("trial")


def over_seeds(values: pd.DataFrame, configuration: pd.Series) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over the trials of a configuration that have a value, and how many have one.

    ``values`` has index ``trial``; ``configuration`` maps a trial to its label.
    """
    groups = values.groupby(configuration.reindex(values.index), sort=False)
    return groups.mean(), groups.count()


def targets_from(curves: pd.DataFrame, score: Score, fractions: Sequence[float] = TARGET_FRACTIONS) -> list[float]:
    """Targets at these fractions of the way from the start to the best score of any trial, to three decimals.

    The start is the untrained model (its mean over trials), or where that was not evaluated the worst score of all.
    Empty where nothing got better.
    """
    known = curves[curves[score.column].notna()]
    if known.empty:
        return []
    values, untrained = score.sign() * known[score.column], known["round"] == UNTRAINED
    start = values[untrained].mean() if untrained.any() else values.min()
    best = values.max()
    targets = [round(float(score.sign() * (start + fraction * (best - start))), 3) for fraction in fractions]
    return list(dict.fromkeys(targets)) if best > start else []


def budgets_from(
    curves: pd.DataFrame, score: Score, cost: str, quantity: str, *, count: int = NUM_BUDGETS
) -> list[float]:
    """Budgets in equal ratios, from the cheapest first evaluation (left out) to the dearest trial's total.

    Rounded to two digits of the unit in which ``quantity`` is shown, the last one up: it holds every trial whole.
    """
    known = curves[curves[score.column].notna() & (curves[cost] > 0)]
    if known.empty:
        return []
    low, high = float(known[cost].min()), float(known[cost].max())
    steps = np.geomspace(low, high, count + 1)[1:] if low < high else np.array([high])
    budgets = [_two_digits(float(step), quantity, up=i == len(steps) - 1) for i, step in enumerate(steps)]
    return list(dict.fromkeys(budgets))


def _best_so_far(curves: pd.DataFrame, score: Score, cost: str) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(trial, costs ``[E]``, best score so far ``[E]``) over each trial's E evaluations, in order of cost."""
    found = []
    known = curves[curves[score.column].notna() & curves[cost].notna()]
    for trial, rows in known.groupby("trial", sort=True):
        rows = rows.sort_values(["round"], kind="stable")
        values = score.sign() * rows[score.column].to_numpy(dtype=float)
        found.append((int(str(trial)), rows[cost].to_numpy(dtype=float), score.sign() * np.maximum.accumulate(values)))
    return found


def _two_digits(value: float, quantity: str, *, up: bool) -> float:
    divisor, _ = scale_of(value, quantity)
    unit = 10.0 ** (math.floor(math.log10(value / divisor)) - 1)
    steps = math.ceil(value / divisor / unit - 1e-9) if up else round(value / divisor / unit)
    return float(f"{steps * unit:.2g}") * divisor


# ---------------------------------------------------------------------- what a swept field does


def robustness(
    trials: pd.DataFrame, score: Score, field: str, rest: pd.Series, *, calm_is_low: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean score at each value of ``field``, and its change relative to the calmest value.

    ``rest`` is each trial's configuration without that field. The calmest value is the lowest (drop-out) or the
    highest (availability). Both tables have index ``rest`` and a column per value, the calmest first; the change is
    -0.1 where a tenth of the score is lost.
    """
    known = trials[trials[score.column].notna()]
    labels = rest.reindex(known.index).rename("rest")
    means = known.groupby([labels, known[field].astype(float)], sort=True)[score.column].mean().unstack()
    means = means.sort_index(axis=1, ascending=calm_is_low)
    reference = means[means.columns[0]]
    return means, means.sub(reference, axis=0).div(reference.abs(), axis=0)


def effect(trials: pd.DataFrame, score: Score, field: str, by: pd.Series) -> pd.DataFrame:
    """Score against one field: ``by, value, mean, spread, num_trials``, over everything else that was swept.

    ``by`` gives the line a trial belongs to (its method). ``spread`` is the sample standard deviation, 0 for one trial.
    """
    known = trials[trials[score.column].notna() & trials[field].notna()]
    groups = known.groupby([by.reindex(known.index).rename("by"), known[field].rename("value")], sort=True)[
        score.column
    ]
    table = groups.agg(mean="mean", spread="std", num_trials="size").reset_index()
    return table.assign(spread=table["spread"].fillna(0.0))


def heat_map(trials: pd.DataFrame, score: Score, row: str, column: str) -> pd.DataFrame:
    """Mean score at each pair of values: index the values of ``row``, columns those of ``column``; NaN: no trial."""
    known = trials[trials[score.column].notna()]
    return known.groupby([row, column], sort=True, observed=True)[score.column].mean().unstack()
