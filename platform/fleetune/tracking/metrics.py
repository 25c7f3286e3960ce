"""A round's row -> MLflow's metrics of that step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fleetune.columns import ROUND_COLUMNS

# Column of rounds.parquet -> metric, once a round with step = round, from 1.
METRICS = {column.name: column.metric for column in ROUND_COLUMNS if column.metric}
# Sums since the first round: what a run's row in MLflow's table should show, and an x-axis for its charts.
TOTALS = {column.name: f"total/{column.name}" for column in ROUND_COLUMNS if column.has_total}
COMMON = {column.name for column in ROUND_COLUMNS}


class RoundMetrics:
    """Rounds in order -> metrics; keeps the running totals."""

    def __init__(self) -> None:
        self.next_round = 1
        self._totals = dict.fromkeys(TOTALS, 0.0)

    def of(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of one round. Values that are missing or not finite are left out; a method's columns are ``method/…``."""
        self.next_round = int(row["round"]) + 1
        metrics: dict[str, float | None] = {key: number(row.get(name)) for name, key in METRICS.items()}
        for name, key in TOTALS.items():
            self._totals[name] += number(row.get(name)) or 0.0
            metrics[key] = self._totals[name]
        metrics |= {f"method/{name}": number(value) for name, value in row.items() if name not in COMMON}
        return {key: value for key, value in metrics.items() if value is not None}


def of_baseline(quality: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the untrained model's quality, which stand at the step `columns.UNTRAINED`."""
    metrics = {METRICS[name]: number(value) for name, value in quality.items() if name in METRICS}
    return {key: value for key, value in metrics.items() if value is not None}


def number(value: Any) -> float | None:
    """A finite number as float, or None."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None
