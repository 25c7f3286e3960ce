"""A sweep's report on score against cost: the Pareto front, and the three protocols (:mod:`fleetune.reports.sweep_stats`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fleetune.reports.figures import sweep as sweep_figures
from fleetune.reports.html import Cell, Note, Part, Table, image, markup
from fleetune.reports.sweep_results import COSTS, SweepResults, amount, configuration_labels, cost_text, value_text
from fleetune.reports.sweep_stats import (
    budgets_from,
    cost_to_target,
    over_seeds,
    pareto_front,
    quality_under_budget,
    robustness,
    targets_from,
)

# Fields whose effect is robustness: what they mean, and whether their lowest value is the calm one.
DISTURBANCES = {
    "fleet.dropout": ("the chance that a client leaves in the middle of its turn", True),
    "fleet.availability.probability": ("the chance that a client is there in a round", False),
}


def pareto_parts(results: SweepResults, folder: Path) -> list[Part]:
    """The configurations that no other beats on both score and a cost."""
    table, score = results.ranking, results.score
    fronts = {
        c.title: pareto_front(table[c.column], table["score"], higher_is_better=score.higher_is_better) for c in COSTS
    }
    rows = []
    for i, (name, row) in enumerate(table.iterrows()):
        on = [title for title, front in fronts.items() if front[i]]
        if on:
            cells = [
                Cell(f"#{row['rank']:.0f}", row["rank"]),
                Cell(str(name)),
                Cell(amount(row["score"], score), row["score"]),
            ]
            cells += [Cell(cost_text(row[c.column], c), row[c.column], best=c.title in on) for c in COSTS]
            rows.append([*cells, Cell(", ".join(on))])
    header = ["rank", "configuration", score.title, *(c.title for c in COSTS), "on the front of"]
    note = "A configuration is on the front where none is as good for less, or better for as much. Numbers are ranks."
    made = sweep_figures.pareto(results, path=folder / "pareto.png")
    return [
        Note(note),
        image(made, f"Pareto front of {score.title} against uplink, virtual time and energy"),
        Table(header, rows, caption="Configurations on a Pareto front"),
    ]


def budget_parts(results: SweepResults, own: dict[str, list[float]], folder: Path) -> list[Part]:
    """The best score that each configuration reached within each budget; ``own`` replaces those of a cost column."""
    chosen = {
        c.column: own.get(c.column) or budgets_from(results.curves, results.score, c.column, c.quantity) for c in COSTS
    }
    made = sweep_figures.budgets(results, chosen, path=folder / "quality_under_budget.png")
    header, columns = ["rank", "configuration"], []
    for cost in COSTS:
        values = quality_under_budget(results.curves, results.score, cost.column, chosen[cost.column])
        means, _ = over_seeds(values, results.trials["configuration"])
        header += [f"{cost.title} ≤ {cost_text(budget, cost)}" for budget in chosen[cost.column]]
        columns += [means[budget] for budget in chosen[cost.column]]
    best = [column.max() if results.score.higher_is_better else column.min() for column in columns]
    rows = _protocol_rows(results, columns, lambda v, _: amount(v, results.score), best)
    note = markup(
        "The best {} that a run had reached before it had spent the budget; the untrained model costs nothing. The best of "
        "each column is bold. Own budgets: <code>--budget 10MB --budget 2h --budget 5kJ</code>.",
        results.score.title,
    )
    alt = f"best {results.score.title} within a budget of uplink, virtual time and energy"
    return [Note(note), image(made, alt), Table(header, rows, caption="Quality under a budget")]


def target_parts(results: SweepResults, own: list[float], folder: Path) -> list[Part]:
    """What each configuration had cost when it first reached each target; ``own`` replaces the targets."""
    chosen = own or targets_from(results.curves, results.score)
    if not chosen:
        reason = (
            "No trial got better than its start, so there is no target to reach. Give one with <code>--target</code>."
        )
        return [Note(markup(reason))]
    header, columns, quantities, reached = ["rank", "configuration"], [], [], {}
    num_trials = results.ranking["num_trials"].to_dict()
    for cost in COSTS:
        values = cost_to_target(results.curves, results.score, cost.column, chosen)
        means, counts = over_seeds(values, results.trials["configuration"])
        reached[cost.column] = means, counts
        for target in chosen:
            header.append(f"{cost.title} to {amount(target, results.score)}")
            columns.append(pd.concat([means[target].rename("value"), counts[target].rename("count")], axis=1))
            quantities.append(cost)
    made = sweep_figures.targets(results, reached, path=folder / "cost_to_target.png")

    def text_of(value: float, at: tuple[int, str]) -> str:
        column, name = at
        count = int(columns[column]["count"].get(name, 0))
        some = f" ({count} of {num_trials[name]})" if 0 < count < num_trials[name] else ""
        return cost_text(value, quantities[column]) + some

    reached_by_all = [column["value"][column["count"] == column.index.map(num_trials)] for column in columns]
    rows = _protocol_rows(
        results, [column["value"] for column in columns], text_of, [column.min() for column in reached_by_all]
    )
    start = "" if own else "Targets lie 50, 75 and 90 % of the way from the untrained model to the best result. "
    note = markup(
        start
        + "A cost is that of the first evaluation which reached the target, the mean over the seeds that did (how many, "
        "if not all: those are hollow). The least of each column that all seeds reached is bold. "
        "Own targets: <code>--target 60%</code>."
    )
    return [Note(note), image(made, "cost to each target"), Table(header, rows, caption="Cost to a target")]


def _protocol_rows(
    results: SweepResults, columns: Sequence[pd.Series], text_of: Any, best: Sequence[float]
) -> list[list[Cell]]:
    """A row per configuration with a value of each column; what equals the column's best is marked."""
    rows = []
    for name in results.ranking.index:
        cells = [Cell(f"#{results.rank(name)}", results.rank(name)), Cell(str(name))]
        for i, column in enumerate(columns):
            value = float(column.get(name, float("nan")))
            cells.append(Cell(text_of(value, (i, name)), value, best=value == best[i]))
        rows.append(cells)
    return rows


def dropout_parts(results: SweepResults, folder: Path) -> list[Part]:
    """How much each configuration loses when clients leave or are away."""
    swept = [field for field in DISTURBANCES if field in results.fields]
    if not swept:
        reason = (
            "This sweep varies neither drop-out nor availability. To see how much each configuration loses when clients "
            "leave, add <code>{}: [0, 0.1, 0.3]</code> to its <code>grid</code>."
        )
        return [Note(markup(reason, next(iter(DISTURBANCES))))]
    return [part for field in swept for part in _disturbance(results, field, *DISTURBANCES[field], folder)]


def _disturbance(results: SweepResults, field: str, meaning: str, calm_is_low: bool, folder: Path) -> list[Part]:
    rest = configuration_labels(results.trials, [other for other in results.fields if other != field])
    means, change = robustness(results.trials, results.score, field, rest, calm_is_low=calm_is_low)
    path = folder / f"robustness_{field.removeprefix('fleet.').replace('.', '_')}.png"
    made = sweep_figures.robustness(results, means, field, path=path)
    calmest, *others = means.columns
    header = ["configuration", f"{results.score.title} at {value_text(calmest)}"]
    header += [f"at {value_text(value)}" for value in others] + [f"change at {value_text(value)}" for value in others]
    rows = []
    for name in means.index:
        cells = [Cell(str(name)), *(Cell(amount(v, results.score), v) for v in means.loc[name])]
        cells += [Cell("–" if v != v else f"{100 * v:+.1f} %", v) for v in change.loc[name, others]]
        rows.append(cells)
    note = markup("<code>{}</code>: {}. Changes are relative to {}.", field, meaning, value_text(calmest))
    note += "" if results.score.higher_is_better else " A loss that rises is worse."
    return [Note(note), image(made, f"{results.score.title} against {field}"), Table(header, rows, caption=field)]
