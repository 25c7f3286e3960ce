"""The numbers that claims compare: a trial's result from the sweep's table, or what its run's records alone can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.claims.config import COMMON, AnyClaim
from fleetune.claims.pairs import key_of
from fleetune.claims.quality import PEAK_MEMORY, Ending, Quality, common_quality, peak_memory, spendings, spent
from fleetune.records.run_directory import RunDirectory

if TYPE_CHECKING:
    import pandas as pd


class Measures:
    """The finished trials of a sweep, and what claims ask of them. A run's records are read once."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        """``rows``: the table of trials as plain values. Only finished trials count: one that was stopped early has spent less
        and learnt less than its partner.
        """
        self.rows = [row for row in rows if row["status"] == "finished"]
        self._spendings: dict[str, pd.DataFrame] = {}

    def value(self, claim: AnyClaim, row: Mapping[str, Any]) -> float:
        """A trial's number for a claim; NaN if it has none, or never came to the claim's quality."""
        if claim.quality is not None:
            quality, rounds = self.quality(claim), self._rounds(row)
            return math.nan if quality is None or rounds is None else spent(rounds, claim.column, quality)
        if claim.column == PEAK_MEMORY:
            run = _run(row)
            return math.nan if run is None else peak_memory(run)
        value = row.get(claim.column)
        return float(value) if value is not None and math.isfinite(value) else math.nan

    def quality(self, claim: AnyClaim) -> Quality | None:
        """The quality up to which a claim counts costs; None without one, or if no configuration learns."""
        if claim.quality is None:
            return None
        column, level = claim.quality
        return self.common(column) if level == COMMON else Quality(column, float(level))

    def common(self, metric: str) -> Quality | None:
        """The common quality of all trials in this metric; None if no configuration learns."""
        configurations: dict[Any, list[Ending]] = {}
        for row in self.rows:
            if row.get(metric) is not None:
                untrained = row.get(f"baseline_{metric}")
                ending = Ending(math.nan if untrained is None else float(untrained), float(row[metric]))
                configurations.setdefault(key_of(row["overrides"]), []).append(ending)
        return common_quality(metric, configurations.values())

    def remark(self, claim: AnyClaim) -> str | None:
        """What the reader should know of a claim's quality: its level, and how many trials never came to it."""
        if claim.quality is None:
            return None
        metric, quality = claim.quality[0], self.quality(claim)
        if quality is None:
            return f"no configuration learns, so there is no common {metric}"
        tables = [table for table in map(self._rounds, self.rows) if table is not None]
        num_missed = sum(math.isnan(spent(table, claim.column, quality)) for table in tables)
        if tables and num_missed == len(tables):
            best = max(
                quality.sign * float(table[metric].max() if quality.sign > 0 else table[metric].min())
                for table in tables
            )
            return f"no trial comes to an {metric} of {quality.text()}: the best is {abs(best):.3g}"
        missed = f", which {num_missed} of the sweep's {len(tables)} trials never reach" if num_missed else ""
        return f"the {metric} is {quality.text()}{missed}" if claim.quality[1] == COMMON or missed else None

    def _rounds(self, row: Mapping[str, Any]) -> pd.DataFrame | None:
        run = _run(row)
        if run is None:
            return None
        key = str(run.path)
        if key not in self._spendings:
            self._spendings[key] = spendings(run)
        return self._spendings[key]


def _run(row: Mapping[str, Any]) -> RunDirectory | None:
    """A trial's run; None if it is gone."""
    place = row.get("run_dir")
    return RunDirectory(Path(place)) if place and (Path(place) / RunDirectory.SPEC).is_file() else None
