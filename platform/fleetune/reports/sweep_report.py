"""A sweep's report: one HTML file beside the sweep that answers what to choose, and its figures as PNG."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fleetune.records.sweep_directory import SweepDirectory
from fleetune.reports.figures import runs as figures
from fleetune.reports.figures import sweep as sweep_figures
from fleetune.reports.figures import swept_fields as sweep_field_figures
from fleetune.reports.figures.style import PALETTE
from fleetune.reports.html import Cell, Items, Note, Page, Part, Section, Table, image
from fleetune.reports.run_stats import STATUSES
from fleetune.reports.sweep_results import (
    COSTS,
    SweepResults,
    amount,
    configuration_labels,
    cost_text,
    parse_budgets,
    parse_targets,
    results_of,
    short_names,
    value_text,
)
from fleetune.reports.sweep_stats import (
    budgets_from,
    cost_to_target,
    over_seeds,
    pareto_front,
    quality_under_budget,
    robustness,
    targets_from,
)
from fleetune.units import percent, readable

# Fields whose effect is robustness: what they mean, and whether their lowest value is the calm one.
DISTURBANCES = {
    "fleet.dropout": ("the chance that a client leaves in the middle of its turn", True),
    "fleet.availability.probability": ("the chance that a client is there in a round", False),
}


def sweep_report(
    path: str | Path, out: str | Path | None = None, *, budgets: Iterable[str] = (), targets: Iterable[str] = ()
) -> Path:
    """Writes ``report.html`` and ``figures/`` into the sweep's directory, or into ``out`` (a folder or an HTML file).

    ``budgets`` ("10MB", "2h", "5kJ") and ``targets`` ("0.6", "60%") replace those taken from the results. Returns the
    HTML file. UserError where there is no sweep, or where none of its trials has finished.
    """
    asked = parse_budgets(budgets), parse_targets(targets)
    sweep = SweepDirectory.open(path)
    results = results_of(sweep)
    out = sweep.path if out is None else Path(out)
    out = out if out.suffix in (".html", ".htm") else out / "report.html"
    folder = out.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        Section("Ranking", _ranking(results)),
        Section("Learning curves", _curves(results, folder)),
        Section(
            "Accuracy against cost" if results.score.is_fraction else "Loss against cost", _pareto(results, folder)
        ),
        Section("Quality under a budget", _budgets(results, asked[0], folder)),
        Section("Cost to a target", _targets(results, asked[1], folder)),
        Section("Robustness to drop-out", _robustness(results, folder)),
        *([Section("What the swept fields do", _fields(results, folder))] if results.fields else []),
        Section("Costs per device class", _devices(results, folder)),
        Section("Trials", [_trials(results, out.parent)]),
    ]
    return Page(results.name, _subtitle(results), sections, lead=[_answer(results)]).write(out)


# ---------------------------------------------------------------------- the outcome


def _subtitle(results: SweepResults) -> str:
    states = results.trials["status"].value_counts()
    told = [f"{count} {state}" for state, count in states.items()]
    fields = ", ".join(results.fields) or "nothing but the seed"
    return f"{len(results.trials)} trials: {', '.join(told)} · varied: {fields} · ranked by {results.score.title}"


def _answer(results: SweepResults) -> Note:
    """The best configuration in a sentence, and what it costs."""
    best = results.ranking.iloc[0]
    name = str(results.ranking.index[0])
    costs = ", ".join(f"{cost_text(best[cost.column], cost)} of {cost.title}" for cost in COSTS)
    sentence = "Best: <b>{}</b> with {} {}, for {}."
    return Note(_markup(sentence, name, results.score.title, _with_spread(results, best), costs), style="answer")


def _ranking(results: SweepResults) -> list[Part]:
    header = ["rank", "configuration", *short_names(results.fields).values(), results.score.title, "trials"]
    header += ["uplink", "downlink", "virtual time", "energy"]
    trials = results.trials.drop_duplicates("configuration").set_index("configuration")
    states = results.trials.groupby("configuration")["status"]
    rows = []
    for name, row in results.ranking.iterrows():
        cells = [Cell(f"#{row['rank']:.0f}", row["rank"]), Cell(str(name))]
        values = trials.loc[str(name)]
        cells += [Cell(value_text(values[field]), values[field]) for field in results.fields]
        cells += [Cell(_with_spread(results, row), row["score"], best=row["rank"] == 1)]
        num_done, num_all = int(row["num_trials"]), int(states.get_group(name).size)
        cells += [Cell(f"{num_done}" if num_done == num_all else f"{num_done} of {num_all}", num_done)]
        quantities = {
            "uplink_bytes": "bytes",
            "downlink_bytes": "bytes",
            "sim_seconds": "seconds",
            "energy_joules": "joules",
        }
        cells += [Cell(readable(row[column], quantity), row[column]) for column, quantity in quantities.items()]
        rows.append(cells)
    note = "Costs are means of whole runs. Click a column's head to sort."
    note = ("± is the sample standard deviation over seeds. " if results.has_seeds else "") + note
    return [Note(note), Table(header, rows, caption="Configurations by rank"), *_failures(results)]


def _failures(results: SweepResults) -> list[Part]:
    """Which trials failed, and why."""
    failed = results.trials[results.trials["status"] == "failed"]
    if failed.empty:
        return []
    lines = []
    for number, row in failed.iterrows():
        seed = f", seed {row['seed']:.0f}" if row["seed"] == row["seed"] else ""
        lines.append(f"trial {number}, {row['configuration']}{seed}: {row['error'] or 'no reason is recorded'}")
    return [Note(f"{len(failed)} failed", style="heading"), Items(lines)]


def _curves(results: SweepResults, folder: Path) -> list[Part]:
    note = "Means over seeds; the band is their range. " if results.has_seeds else ""
    note += f"The best {len(PALETTE)} are coloured." if len(results.ranking) > len(PALETTE) else ""
    made = sweep_figures.curves(results, path=folder / "curves.png")
    return [*([Note(note)] if note else []), image(made, f"{results.score.title} over rounds, virtual time and uplink")]


def _pareto(results: SweepResults, folder: Path) -> list[Part]:
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


# ---------------------------------------------------------------------- the three protocols


def _budgets(results: SweepResults, asked: dict[str, list[float]], folder: Path) -> list[Part]:
    chosen = {
        c.column: asked.get(c.column) or budgets_from(results.curves, results.score, c.column, c.quantity)
        for c in COSTS
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
    note = _markup(
        "The best {} that a run had reached before it had spent the budget; the untrained model costs nothing. The best of "
        "each column is bold. Own budgets: <code>--budget 10MB --budget 2h --budget 5kJ</code>.",
        results.score.title,
    )
    alt = f"best {results.score.title} within a budget of uplink, virtual time and energy"
    return [Note(note), image(made, alt), Table(header, rows, caption="Quality under a budget")]


def _targets(results: SweepResults, asked: list[float], folder: Path) -> list[Part]:
    chosen = asked or targets_from(results.curves, results.score)
    if not chosen:
        reason = (
            "No trial got better than its start, so there is no target to reach. Give one with <code>--target</code>."
        )
        return [Note(_markup(reason))]
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

    def told(value: float, at: tuple[int, str]) -> str:
        column, name = at
        count = int(columns[column]["count"].get(name, 0))
        some = f" ({count} of {num_trials[name]})" if 0 < count < num_trials[name] else ""
        return cost_text(value, quantities[column]) + some

    whole = [column["value"][column["count"] == column.index.map(num_trials)] for column in columns]
    rows = _protocol_rows(results, [column["value"] for column in columns], told, [column.min() for column in whole])
    start = "" if asked else "Targets lie 50, 75 and 90 % of the way from the untrained model to the best result. "
    note = _markup(
        start
        + "A cost is that of the first evaluation which reached the target, the mean over the seeds that did (how many, "
        "if not all: those are hollow). The least of each column that all seeds reached is bold. "
        "Own targets: <code>--target 60%</code>."
    )
    return [Note(note), image(made, "cost to each target"), Table(header, rows, caption="Cost to a target")]


def _protocol_rows(
    results: SweepResults, columns: Sequence[pd.Series], told: Any, best: Sequence[float]
) -> list[list[Cell]]:
    """A row per configuration with a value of each column; what equals the column's best is marked."""
    rows = []
    for name in results.ranking.index:
        cells = [Cell(f"#{results.rank(name)}", results.rank(name)), Cell(str(name))]
        for i, column in enumerate(columns):
            value = float(column.get(name, float("nan")))
            cells.append(Cell(told(value, (i, name)), value, best=value == best[i]))
        rows.append(cells)
    return rows


def _robustness(results: SweepResults, folder: Path) -> list[Part]:
    swept = [field for field in DISTURBANCES if field in results.fields]
    if not swept:
        reason = (
            "This sweep varies neither drop-out nor availability. To see how much each configuration loses when clients "
            "leave, add <code>{}: [0, 0.1, 0.3]</code> to its <code>grid</code>."
        )
        return [Note(_markup(reason, next(iter(DISTURBANCES))))]
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
    note = _markup("<code>{}</code>: {}. Changes are relative to {}.", field, meaning, value_text(calmest))
    note += "" if results.score.higher_is_better else " A loss that rises is worse."
    return [Note(note), image(made, f"{results.score.title} against {field}"), Table(header, rows, caption=field)]


# ---------------------------------------------------------------------- fields, devices, trials


def _fields(results: SweepResults, folder: Path) -> list[Part]:
    parts: list[Part] = []
    effects = sweep_field_figures.effects(results, path=folder / "effects.png")
    if effects:
        note = "Means over everything else that was swept, seeds included; a bar is the standard deviation."
        parts += [Note(note), image(effects, f"{results.score.title} against each swept field")]
    heat = sweep_field_figures.heat(results, path=folder / "heat_map.png")
    if heat:
        note = f"Both fields together{', means over seeds' if results.has_seeds else ''}."
        parts += [Note(note), image(heat, f"{results.score.title} for each pair of values")]
    lines = sweep_field_figures.parallel(results, path=folder / "parallel.png")
    if lines:
        alt = "a line per configuration through its fields, costs and score"
        parts += [Note("A line is a configuration; the best is the thickest."), image(lines, alt)]
    return parts or [Note("Only the method was swept: the ranking says it all.")]


def _devices(results: SweepResults, folder: Path) -> list[Part]:
    best = sweep_figures.shown_configurations(results)
    known = [name for name in best if name in results.devices.index.get_level_values("configuration")]
    devices = results.devices.reset_index(level="configuration")
    bars = {results.label(name): devices[devices["configuration"] == name] for name in known}
    made = figures.device_bars(bars, path=folder / "cost_by_device.png")
    header = ["rank", "configuration", "device class", "turns", "time of a turn", "computing", "receiving", "sending"]
    header += ["sent", "received", "energy", "peak memory", "memory budget", "out of memory"]
    header += ["other budget", "dropped", "late", "failed"]
    rows = []
    for _, c in results.devices.reset_index().iterrows():
        name, device = str(c["configuration"]), str(c["device"])
        cells = [Cell(f"#{results.rank(name)}", results.rank(name)), Cell(name), Cell(device)]
        cells += [Cell(f"{c['num_turns']:.0f}", c["num_turns"])]
        for column, quantity in _DEVICE_COLUMNS.items():
            cells.append(Cell(readable(c[column], quantity), c[column]))
        cells += [Cell(percent(c[f"{s}_fraction"]), c[f"{s}_fraction"]) for s in STATUSES]
        rows.append(cells)
    rows.sort(key=lambda cells: (float(str(cells[0].value)), cells[2].text))
    note = (
        "Means of a client's turn, over rounds, clients and seeds; memory is the largest need, refused turns included. "
        "Shares of all turns: refused for memory or for another budget, dropped, late, failed."
    )
    if len(results.ranking) > len(bars):
        note += f" The figure shows the best {len(bars)}."
    return [Note(note), image(made, "costs of a turn per device class"), Table(header, rows, caption="Costs")]


_DEVICE_COLUMNS = {
    "sim_seconds": "seconds",
    "compute_seconds": "seconds",
    "downlink_seconds": "seconds",
    "uplink_seconds": "seconds",
    "uplink_bytes": "bytes",
    "downlink_bytes": "bytes",
    "energy_joules": "joules",
    "peak_memory_bytes": "bytes",
    "budget_bytes": "bytes",
}


def _trials(results: SweepResults, base: Path) -> Table:
    header = ["trial", "configuration", "seed", "status", "rounds", "accuracy", "evaluation loss", "training loss"]
    header += ["uplink", "virtual time", "energy", "out of memory", "run"]
    rows = []
    for number, t in results.trials.iterrows():
        seed = "–" if t["seed"] != t["seed"] or t["seed"] is None else f"{t['seed']:.0f}"
        cells = [Cell(str(number), number), Cell(t["configuration"]), Cell(seed, t["seed"])]
        cells += [Cell(t["status"]), Cell(_whole(t["num_rounds"]), t["num_rounds"])]
        cells += [Cell(percent(t["eval_accuracy"]), t["eval_accuracy"])]
        cells += [Cell("–" if t[c] != t[c] else f"{t[c]:.3f}", t[c]) for c in ("eval_loss", "train_loss")]
        cells += [Cell(cost_text(t[c.column], c), t[c.column]) for c in COSTS]
        cells += [Cell(_whole(t["num_oom"]), t["num_oom"]), _run_link(t, base)]
        rows.append(cells)
    return Table(header, rows, caption="Trials")


def _run_link(trial: pd.Series, base: Path) -> Cell:
    if not isinstance(trial["run_dir"], str) or not Path(trial["run_dir"]).is_dir():
        return Cell("–")
    name = str(trial["run_id"])
    return Cell(name, links=((name, os.path.relpath(trial["run_dir"], base.absolute())),))


def _with_spread(results: SweepResults, row: pd.Series) -> str:
    """``71.2 ± 1.3 %``, or without spread where one trial has no spread."""
    if row["spread"] != row["spread"]:
        return amount(row["score"], results.score)
    if results.score.is_fraction:
        return f"{100 * row['score']:.1f} ± {100 * row['spread']:.1f} %"
    return f"{row['score']:.3f} ± {row['spread']:.3f}"


def _whole(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.0f}"


def _markup(sentence: str, *values: object) -> str:
    """A sentence with code or emphasis in it; the values that it is filled with are escaped."""
    from markupsafe import Markup

    return Markup(sentence).format(*values) if values else Markup(sentence)
