"""A sweep's configurations side by side: quality and costs, mean and spread over seeds, and what a common quality costs each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fleetune.claims.quality import (
    DIGITS,
    PEAK_MEMORY,
    QUALITIES,
    Ending,
    Quality,
    common_quality,
    learns,
    peak_memory,
    spendings,
    spent,
)
from fleetune.columns import HIGHER_IS_BETTER
from fleetune.records.run_directory import RunDirectory
from fleetune.reports.html import Cell, Note, Part, Table
from fleetune.reports.sweep_results import SweepResults
from fleetune.units import NOTHING, scale_of

SPENT_UNTIL = {"sim_seconds": ("virtual time", "seconds"), "uplink_bytes": ("uplink", "bytes")}
"""The costs that are given up to a quality: their title and quantity."""
COMPARED = {
    "eval_accuracy": ("accuracy", "fraction"),
    "eval_loss": ("loss", "loss"),
    "uplink_bytes": ("uplink", "bytes"),
    "downlink_bytes": ("downlink", "bytes"),
    "energy_joules": ("energy", "joules"),
    PEAK_MEMORY: ("peak memory", "bytes"),
    "fit_fraction": ("clients that fit", "fraction"),
}
"""What is compared of whole runs: titles and quantities."""
HIGH = {*HIGHER_IS_BETTER, "fit_fraction"}
RULE = (
    "It is the worst with which a trial has ended, among those of all configurations that learn (whose 95 % interval over seeds "
    "is better than the untrained model), to three decimals."
)


@dataclass(frozen=True)
class Spread:
    """A quantity over the seeds that have it."""

    mean: float
    deviation: float
    """The sample standard deviation; NaN for one seed."""
    num_seeds: int


@dataclass(frozen=True)
class Row:
    """One configuration."""

    configuration: str
    num_seeds: int
    learns: bool
    """True if its loss, or where there is none its accuracy, is better than the untrained model's over its seeds."""
    values: dict[str, Spread]
    """By column; costs up to the i-th quality are ``sim_seconds_to_i`` and ``uplink_bytes_to_i``."""


@dataclass(frozen=True)
class Comparison:
    """All configurations, the best first."""

    qualities: tuple[Quality, ...]
    is_common: bool
    """True if the quality is the sweep's own (`claims.quality`), and not the user's."""
    untrained: dict[str, float]
    rows: tuple[Row, ...]

    def columns(self) -> list[tuple[str, str, str]]:
        """(column, title, quantity) in the order of the table; what no configuration has is left out."""
        until = [
            (_until(cost, i), f"{title} to {quality.text()}", unit)
            for i, quality in enumerate(self.qualities)
            for cost, (title, unit) in SPENT_UNTIL.items()
        ]
        whole = [(name, title, unit) for name, (title, unit) in COMPARED.items()]
        found = [*whole[:2], *until, *whole[2:]]
        return [each for each in found if _is_until(each[0]) or any(row.values[each[0]].num_seeds for row in self.rows)]

    def to_dict(self) -> dict[str, Any]:
        """The same numbers as plain data, for ``--json``."""
        return {
            "qualities": [{"metric": quality.metric, "level": quality.level} for quality in self.qualities],
            "is_common": self.is_common,
            "untrained": self.untrained,
            "configurations": [
                {
                    "configuration": row.configuration,
                    "num_seeds": row.num_seeds,
                    "learns": row.learns,
                    **{name: vars(value) for name, value in row.values.items()},
                }
                for row in self.rows
            ],
        }


def comparison_of(results: SweepResults, targets: Sequence[float] = ()) -> Comparison:
    """Compares the finished trials of a sweep. ``targets``: levels of the score that ranks it, instead of the common loss."""
    trials = results.trials[results.trials["status"] == "finished"]
    groups = [(str(name), trials[trials["configuration"] == name]) for name in results.ranking.index]
    groups = [(name, group) for name, group in groups if len(group)]
    metric = next((name for name in ("eval_loss", "eval_accuracy") if trials[name].notna().any()), None)
    endings = {name: _endings(group, metric) if metric else [] for name, group in groups}
    if targets and results.score.column in QUALITIES:
        qualities = [Quality(results.score.column, target) for target in targets]
    else:
        common = common_quality(metric, endings.values()) if metric else None
        qualities = [common] if common is not None else []
    sign = Quality(metric, 0.0).sign if metric else 1
    rows = []
    for name, group in groups:
        table = pd.DataFrame([_of_trial(row, qualities) for _, row in group.iterrows()])
        values = {column: _spread(table[column]) for column in table.columns}
        rows.append(Row(name, len(group), learns(endings[name], sign), values))
    known = {name: trials[f"baseline_{name}"].dropna() for name in QUALITIES}
    untrained = {name: float(values.mean()) for name, values in known.items() if len(values)}
    return Comparison(tuple(qualities), not targets, untrained, tuple(rows))


def comparison_parts(comparison: Comparison) -> list[Part]:
    """What the numbers are, and the table, whose first row is the untrained model."""
    columns = comparison.columns()
    rows = [_untrained_cells(comparison, columns)] if comparison.untrained else []
    best = {name: _best(comparison, name) for name, _, _ in columns}
    for row in comparison.rows:
        cells = [Cell(row.configuration), Cell(str(row.num_seeds), row.num_seeds)]
        for name, _, quantity in columns:
            value = row.values[name]
            text = spread_text(value, quantity) + (_reached_text(value, row.num_seeds) if _is_until(name) else "")
            cells.append(Cell(text, value.mean, best=value.mean == best[name]))
        rows.append(cells)
    header = ["configuration", "seeds", *(title for _, title, _ in columns)]
    return [Note(_about(comparison)), Table(header, rows, caption="Comparison")]


def spread_text(value: Spread, quantity: str) -> str:
    """``48.1 ± 0.9 %``, ``0.129 ± 0.003`` or ``66.8 ± 0.4 MB``: the mean with three digits, its deviation with as many decimals.

    ``quantity``: bytes, seconds, joules, fraction (in percent) or loss.
    """
    if not value.num_seeds:
        return NOTHING
    divisor, unit, decimals = 1.0, "", DIGITS
    if quantity == "fraction":
        divisor, unit, decimals = 0.01, "%", 1
    elif quantity != "loss":
        divisor, unit = scale_of(abs(value.mean), quantity)
        scaled = abs(value.mean) / divisor
        decimals = max(0, 2 - math.floor(math.log10(scaled))) if scaled > 0 else 0
    text = f"{value.mean / divisor:.{decimals}f}"
    if math.isfinite(value.deviation):
        text += f" ± {value.deviation / divisor:.{decimals}f}"
    return f"{text} {unit}".rstrip()


def _until(cost: str, place: int) -> str:
    """The column of a cost up to the quality at this place."""
    return f"{cost}_to_{place}"


def _is_until(column: str) -> bool:
    return column not in COMPARED


def _endings(group: pd.DataFrame, metric: str) -> list[Ending]:
    ended = group[group[metric].notna()]
    pairs = zip(ended[f"baseline_{metric}"], ended[metric], strict=True)
    return [Ending(float(untrained), float(final)) for untrained, final in pairs]


def _of_trial(row: pd.Series, qualities: Sequence[Quality]) -> dict[str, float]:
    """A trial's numbers; NaN where its run is gone."""
    found = {name: float(row[name]) for name in COMPARED if name in row.index and row[name] is not None}
    place = row["run_dir"]
    if not (isinstance(place, str) and (Path(place) / RunDirectory.SPEC).is_file()):
        missing = [_until(cost, i) for i in range(len(qualities)) for cost in SPENT_UNTIL]
        return {**dict.fromkeys([*COMPARED, *missing], math.nan), **found}
    run = RunDirectory(Path(place))
    rounds = spendings(run)
    for i, quality in enumerate(qualities):
        for cost in SPENT_UNTIL:
            found[_until(cost, i)] = spent(rounds, cost, quality)
    return {**found, PEAK_MEMORY: peak_memory(run), "fit_fraction": _fit_fraction(run)}


def _fit_fraction(run: RunDirectory) -> float:
    """The share of turns that were not refused for memory."""
    rounds = run.rounds()
    turns = float(rounds["num_clients"].sum())
    return 1.0 - float(rounds["num_oom"].sum()) / turns if turns else math.nan


def _spread(values: pd.Series) -> Spread:
    known = values.astype(float).dropna()
    return Spread(float(known.mean()), float(known.std(ddof=1)), len(known))


def _untrained_cells(comparison: Comparison, columns: Sequence[tuple[str, str, str]]) -> list[Cell]:
    cells = [Cell("untrained model"), Cell(NOTHING)]
    for name, _, quantity in columns:
        level = comparison.untrained.get(name, math.nan)
        cells.append(Cell(spread_text(Spread(level, math.nan, int(level == level)), quantity), level))
    return cells


def _reached_text(value: Spread, num_seeds: int) -> str:
    """How many seeds came to the quality, unless all did."""
    return "" if value.num_seeds == num_seeds else f" ({value.num_seeds} of {num_seeds})"


def _best(comparison: Comparison, name: str) -> float:
    """The best mean of a column; NaN if all are equal. A cost to a quality counts if all seeds came to it."""
    rows = [row for row in comparison.rows if not _is_until(name) or row.values[name].num_seeds == row.num_seeds]
    means = [row.values[name].mean for row in rows if row.values[name].num_seeds]
    if len(set(means)) < 2:
        return math.nan
    return max(means) if name in HIGH else min(means)


def _about(comparison: Comparison) -> str:
    """What stands in the table, in sentences."""
    has_seeds = any(row.num_seeds > 1 for row in comparison.rows)
    sentences = [
        "Means over seeds ± the sample standard deviation." if has_seeds else "One seed of each configuration."
    ]
    if comparison.qualities:
        word = "accuracy" if comparison.qualities[0].metric == "eval_accuracy" else "loss"
        levels = ", ".join(quality.text() for quality in comparison.qualities)
        which = f"the common {word} of {levels}" if comparison.is_common else f"a {word} of {levels}"
        sentences.append(
            f"Virtual time and uplink to {which} are those at the first evaluation that came to it; where not all seeds did, it "
            "says how many, and the mean is over these."
        )
        sentences += [RULE] if comparison.is_common else []
    else:
        sentences.append("No configuration learns, so there is no common quality whose cost could be compared.")
    sentences.append(
        "Uplink, downlink and energy are of all clients over the whole run, peak memory is the largest of a client."
    )
    sentences.append("Clients fit in a turn that is not refused for memory.")
    if comparison.untrained:
        idle = [row.configuration for row in comparison.rows if not row.learns]
        sentences.append(
            f"Not better than the untrained model: {', '.join(idle)}." if idle else "All configurations learn."
        )
    return " ".join(sentences)
