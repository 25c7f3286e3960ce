"""A sweep's report: one HTML file beside the sweep that answers what to choose, and its figures as PNG."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from fleetune.claims.verdicts import as_dicts, verdicts_of
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.reports.claims import claim_parts
from fleetune.reports.comparison import Comparison, comparison_of, comparison_parts
from fleetune.reports.figures import devices as device_figures
from fleetune.reports.figures import sweep as sweep_figures
from fleetune.reports.figures import swept_fields as sweep_field_figures
from fleetune.reports.figures.style import PALETTE
from fleetune.reports.html import Cell, Items, Note, Page, Part, Section, Table, image, markup
from fleetune.reports.markdown import markdown
from fleetune.reports.run_stats import RUN_COSTS, STATUSES, paid
from fleetune.reports.sweep_protocols import budget_parts, dropout_parts, pareto_parts, target_parts
from fleetune.reports.sweep_results import (
    COSTS,
    SweepResults,
    amount,
    cost_text,
    parse_budgets,
    parse_targets,
    results_of,
    short_names,
    value_text,
)
from fleetune.units import percent, readable


def sweep_report(
    path: str | Path, out: str | Path | None = None, *, budgets: Iterable[str] = (), targets: Iterable[str] = ()
) -> Path:
    """Writes ``report.html`` and ``figures/`` into the sweep's directory, or into ``out`` (a folder or an HTML file).

    ``budgets`` ("10MB", "2h", "5kJ") and ``targets`` ("0.6", "60%") replace those taken from the results. Returns the
    HTML file. If the sweep has claims, the page shows the verdicts, and in the sweep's directory they are written to
    ``claims.json``. Raises UserError if there is no sweep, if none of its trials has finished, or if its claims are wrong.
    """
    own_budgets, own_targets = parse_budgets(budgets), parse_targets(targets)
    sweep = SweepDirectory.open(path)
    results = results_of(sweep)
    out = sweep.path if out is None else Path(out)
    out = out if out.suffix in (".html", ".htm") else out / "report.html"
    folder = out.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = verdicts_of(sweep)
    if out.parent.absolute() == sweep.path:
        sweep.write_verdicts(as_dicts(verdicts))
    sections = [
        Section("Ranking", _ranking(results)),
        Section("Comparison", comparison_parts(comparison_of(results, own_targets))),
        *([Section("Claims", claim_parts(verdicts))] if verdicts else []),
        Section("Learning curves", _curves(results, folder)),
        Section(
            "Accuracy against cost" if results.score.is_fraction else "Loss against cost", pareto_parts(results, folder)
        ),
        Section("Quality under a budget", budget_parts(results, own_budgets, folder)),
        Section("Cost to a target", target_parts(results, own_targets, folder)),
        Section("Robustness to drop-out", dropout_parts(results, folder)),
        *([Section("What the swept fields do", _fields(results, folder))] if results.fields else []),
        Section("Costs per device class", _devices(results, folder)),
        Section("Trials", [_trials(results, out.parent)]),
    ]
    return Page(results.name, _subtitle(results), sections, lead=[_answer(results)]).write(out)


def sweep_comparison(path: str | Path, *, targets: Iterable[str] = ()) -> Comparison:
    """The comparison of a sweep's configurations, as its report shows it. Raises UserError as `sweep_report` does."""
    return comparison_of(results_of(SweepDirectory.open(path)), parse_targets(targets))


def sweep_markdown(path: str | Path, *, targets: Iterable[str] = ()) -> str:
    """The comparison of a sweep's configurations and the verdicts on its claims as Markdown. Raises UserError likewise."""
    verdicts = verdicts_of(SweepDirectory.open(path))
    parts = comparison_parts(sweep_comparison(path, targets=targets))
    return markdown([*parts, *(claim_parts(verdicts) if verdicts else [])])


# ---------------------------------------------------------------------- the outcome


def _subtitle(results: SweepResults) -> str:
    states = results.trials["status"].value_counts()
    counts = [f"{count} {state}" for state, count in states.items()]
    fields = ", ".join(results.fields) or "nothing but the seed"
    return f"{len(results.trials)} trials: {', '.join(counts)} · varied: {fields} · ranked by {results.score.title}"


def _answer(results: SweepResults) -> Note:
    """The best configuration in a sentence, and what it costs."""
    best = results.ranking.iloc[0]
    name = str(results.ranking.index[0])
    costs = ", ".join(f"{cost_text(best[cost.column], cost)} of {cost.title}" for cost in COSTS)
    sentence = "Best: <b>{}</b> with {} {}, for {}."
    return Note(markup(sentence, name, results.score.title, _with_spread(results, best), costs), style="answer")


def _ranking(results: SweepResults) -> list[Part]:
    header = ["rank", "configuration", *short_names(results.fields).values(), results.score.title, "trials"]
    header += [cost.title for cost in RUN_COSTS.values()]
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
        cells += [Cell(readable(row[name], cost.unit), row[name]) for name, cost in RUN_COSTS.items()]
        rows.append(cells)
    note = "Costs are means of whole runs. Click a column's head to sort."
    note = ("± is the sample standard deviation over seeds. " if results.has_seeds else "") + note
    return [Note(note), Table(header, rows, caption="Configurations by rank"), *_failures(results)]


def _failures(results: SweepResults) -> list[Part]:
    """The trials that failed, and why."""
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
    with_costs = [name for name in best if name in results.devices.index.get_level_values("configuration")]
    devices = results.devices.reset_index(level="configuration")
    bars = {results.label(name): devices[devices["configuration"] == name] for name in with_costs}
    made = device_figures.device_bars(bars, path=folder / "cost_by_device.png")
    columns = paid(results.devices)
    header = ["rank", "configuration", "device class", "turns", *(column.title for column in columns)]
    header += ["out of memory", "other budget", "dropped", "late", "failed"]
    rows = []
    for _, c in results.devices.reset_index().iterrows():
        name, device = str(c["configuration"]), str(c["device"])
        cells = [Cell(f"#{results.rank(name)}", results.rank(name)), Cell(name), Cell(device)]
        cells += [Cell(f"{c['num_turns']:.0f}", c["num_turns"])]
        cells += [Cell(readable(c[column.name], column.unit), c[column.name]) for column in columns]
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


def _trials(results: SweepResults, base: Path) -> Table:
    header = ["trial", "configuration", "seed", "status", "rounds", "accuracy", "evaluation loss", "training loss"]
    header += [*(cost.title for cost in COSTS), "out of memory", "run"]
    rows = []
    for number, t in results.trials.iterrows():
        seed = "–" if t["seed"] != t["seed"] or t["seed"] is None else f"{t['seed']:.0f}"
        cells = [Cell(str(number), number), Cell(t["configuration"]), Cell(seed, t["seed"])]
        cells += [Cell(t["status"]), Cell(_count(t["num_rounds"]), t["num_rounds"])]
        cells += [Cell(percent(t["eval_accuracy"]), t["eval_accuracy"])]
        cells += [Cell("–" if t[c] != t[c] else f"{t[c]:.3f}", t[c]) for c in ("eval_loss", "train_loss")]
        cells += [Cell(cost_text(t[c.column], c), t[c.column]) for c in COSTS]
        cells += [Cell(_count(t["num_oom"]), t["num_oom"]), _run_link(t, base)]
        rows.append(cells)
    return Table(header, rows, caption="Trials")


def _run_link(trial: pd.Series, base: Path) -> Cell:
    if not isinstance(trial["run_dir"], str) or not Path(trial["run_dir"]).is_dir():
        return Cell("–")
    name = str(trial["run_id"])
    return Cell(name, links=((name, os.path.relpath(trial["run_dir"], base.absolute())),))


def _with_spread(results: SweepResults, row: pd.Series) -> str:
    """``71.2 ± 1.3 %``, or without the spread, which one trial does not have."""
    if row["spread"] != row["spread"]:
        return amount(row["score"], results.score)
    if results.score.is_fraction:
        return f"{100 * row['score']:.1f} ± {100 * row['spread']:.1f} %"
    return f"{row['score']:.3f} ± {row['spread']:.3f}"


def _count(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.0f}"
