"""The results of a sweep as tables: trials with their configuration, curves of their runs, costs per device class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fleetune.errors import UserError
from fleetune.records.naming import shown
from fleetune.records.run_directory import RunDirectory
from fleetune.records.sweep_directory import PREFIX, SweepDirectory
from fleetune.reports.run_stats import RUN_COSTS, device_costs, rounds_from_the_start
from fleetune.reports.sweep_stats import SCORES, Score, ranking, score_of
from fleetune.units import SCALES, readable

METHOD, SEED = "method.name", "seed"
DONE = ("finished", "stopped")


@dataclass(frozen=True)
class Cost:
    """One kind of cost of a result: its column in trials and curves (since the start), its name, its quantity."""

    column: str
    title: str
    quantity: str


# The costs that scores are set against; bytes received go by those sent, so they are in the tables only.
COSTS = tuple(
    Cost(name, RUN_COSTS[name].title, RUN_COSTS[name].unit) for name in ("uplink_bytes", "sim_seconds", "energy_joules")
)


@dataclass(frozen=True)
class SweepResults:
    """The results of a sweep.

    ``fields`` are the dotted fields that vary, seed aside; in ``trials`` (index ``trial``) each is a column, beside
    ``configuration`` and the columns of ``trials.parquet``. ``ranking`` and ``curves`` are those of
    :mod:`fleetune.reports.sweep_stats`; ``devices`` has a row per configuration and device class.
    """

    name: str
    fields: tuple[str, ...]
    trials: pd.DataFrame
    score: Score
    ranking: pd.DataFrame
    curves: pd.DataFrame
    devices: pd.DataFrame

    def label(self, configuration: str) -> str:
        """A configuration with its rank, as every figure and table calls it: ``#1 devft · growth_rate 2``."""
        return f"#{self.rank(configuration)} {configuration}"

    def rank(self, configuration: str) -> int:
        """A configuration's place in the ranking, from 1."""
        return int(self.ranking["rank"].to_dict()[configuration])

    @property
    def has_seeds(self) -> bool:
        """True if some configuration was run with several seeds."""
        return bool((self.ranking["num_trials"] > 1).any())


def results_of(sweep: SweepDirectory) -> SweepResults:
    """Reads a sweep's table and the runs of its trials that ended well (finished, or stopped early by the sweep).

    Raises UserError if no trial ended well, or if none of their runs is there.
    """
    trials, fields = _trials(sweep.trials())
    done = trials[trials["status"].isin(DONE)]
    if done.empty:
        states = ", ".join(f"{n} {state}" for state, n in trials["status"].value_counts().items()) or "it has none"
        hint = "launch the sweep again: it finishes what is missing"
        raise UserError(f"no trial has finished ({states})", field="sweep_dir", value=str(sweep.path), hint=hint)
    places = {int(str(trial)): Path(place) for trial, place in done["run_dir"].items() if isinstance(place, str)}
    runs = {trial: RunDirectory(place) for trial, place in places.items() if (place / "spec.yaml").is_file()}
    if not runs:
        hint = f"looked for {next(iter(places.values()), 'none')}"
        raise UserError("the runs of its trials are gone", field="sweep_dir", value=str(sweep.path), hint=hint)
    spec = sweep.spec
    score = score_of(done, prefer=spec.get("metric"))
    return SweepResults(
        name=str(spec.get("name") or sweep.run_id),
        fields=tuple(fields),
        trials=trials,
        score=score,
        ranking=ranking(done, score, tuple(RUN_COSTS)),
        curves=_curves(runs, done["configuration"]),
        devices=_devices(runs, done["configuration"]),
    )


def configuration_labels(trials: pd.DataFrame, fields: Sequence[str]) -> pd.Series:
    """Each trial's configuration in words: ``devft · growth_rate 2``; ``base job`` if nothing varies."""
    names = short_names(fields)
    words: list[list[str]] = [[] for _ in range(len(trials))]
    for field in sorted(fields, key=lambda f: f != METHOD):
        for place, value in enumerate(trials[field].tolist()):
            if value == value and value is not None:
                words[place].append(value_text(value) if field == METHOD else f"{names[field]} {value_text(value)}")
    return pd.Series([" · ".join(w) or "base job" for w in words], index=trials.index)


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted field, or its last two if another field has the same one; method for its name."""
    last = {field: "method" if field == METHOD else field.rpartition(".")[2] for field in fields}
    last_parts = list(last.values())
    return {f: name if last_parts.count(name) == 1 else ".".join(f.split(".")[-2:]) for f, name in last.items()}


def value_text(value: Any) -> str:
    """A swept field's value as text: 0.5, 4 (also if pandas has made it 4.0), a dash for none."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else shown(value)


def parse_budgets(texts: Iterable[str]) -> dict[str, list[float]]:
    """``["10MB", "2h"]`` -> cost column -> amounts, ascending; the unit tells which cost is meant. UserError otherwise."""
    units = {unit.lower(): (cost.column, size) for cost in COSTS for unit, size in SCALES[cost.quantity]}
    found: dict[str, list[float]] = {}
    for text in texts:
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)\s*", text.lower())
        if not match or match[2] not in units or not _is_number(match[1]) or float(match[1]) <= 0:
            units_text = ", ".join(unit for cost in COSTS for unit, _ in SCALES[cost.quantity])
            rule = "a budget is a positive number with the unit of its cost"
            raise UserError(rule, field="--budget", value=text, hint=f"such as 10MB, 2h or 5kJ; units: {units_text}")
        column, size = units[match[2]]
        found.setdefault(column, []).append(float(match[1]) * size)
    return {column: sorted(set(amounts)) for column, amounts in found.items()}


def parse_targets(texts: Iterable[str]) -> list[float]:
    """``["0.6", "75%"]`` -> [0.6, 0.75]; for losses plain numbers. UserError where one is no number."""
    found = []
    for text in texts:
        number = text.strip().removesuffix("%")
        if not _is_number(number):
            raise UserError("a target is a number", field="--target", value=text, hint="such as 0.6 or 60%")
        found.append(float(number) / (100 if text.strip().endswith("%") else 1))
    return list(dict.fromkeys(found))


def amount(value: float | None, score: Score) -> str:
    """A score as text: a percentage for a fraction, three decimals for a loss."""
    if value is None or value != value:
        return "–"
    return f"{100 * value:.1f} %" if score.is_fraction else f"{value:.3f}"


def cost_text(value: float | None, cost: Cost) -> str:
    """A cost as text, with the unit that suits it."""
    return readable(value, cost.quantity)


def _trials(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The trials by number, swept fields under their own names, and the names of those that vary."""
    table = table.set_index("trial").sort_index()
    swept = {column: column.removeprefix(PREFIX) for column in table.columns if column.startswith(PREFIX)}
    values = {field: _comparable(table[column]) for column, field in swept.items() if field != SEED}
    trials = table.drop(columns=list(swept)).assign(**values)
    fields = [field for field in values if trials[field].nunique(dropna=False) > 1]
    return trials.assign(configuration=configuration_labels(trials, fields)), fields


def _comparable(values: pd.Series) -> pd.Series:
    """Numbers as numbers; all else as text, in the order of first use (a categorical)."""
    present = values.dropna()
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in present):
        return values.astype(float)
    words = values.map(lambda v: None if v is None or v != v else shown(v), na_action="ignore")
    return pd.Series(pd.Categorical(words, categories=list(dict.fromkeys(words.dropna()))), index=values.index)


def _curves(runs: Mapping[int, RunDirectory], configuration: pd.Series) -> pd.DataFrame:
    names = {"uplink_total": "uplink_bytes", "energy_total": "energy_joules"}
    columns = ["round", *(cost.column for cost in COSTS), *(score.column for score in SCORES)]
    frames = []
    for trial, run in runs.items():
        rounds = rounds_from_the_start(run).drop(columns=list(names.values())).rename(columns=names)
        frames.append(rounds[columns].astype(float).assign(trial=trial, configuration=configuration[trial]))
    return pd.concat(frames, ignore_index=True)


def _devices(runs: Mapping[int, RunDirectory], configuration: pd.Series) -> pd.DataFrame:
    """Costs of a turn per configuration and device class, means over seeds; the largest need of any seed."""
    frames = [device_costs(run).reset_index().assign(configuration=configuration[t]) for t, run in runs.items()]
    groups = pd.concat(frames).groupby(["configuration", "device"], sort=True)
    return groups.mean().assign(peak_memory_bytes=groups["peak_memory_bytes"].max())


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
