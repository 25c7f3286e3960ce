"""What a run had spent when it came to a quality, and the quality that all compared runs come to.

The common quality of a sweep, a loss or an accuracy, is chosen by one rule: it is the worst with which a trial has ended,
among the trials of all configurations that learn. So whoever learns reaches it with every seed, and nobody chooses it by the
outcome. A configuration is what trials that differ in their seed alone have in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fleetune.claims.statistics import interval
from fleetune.columns import HIGHER_IS_BETTER, ROUND_COLUMNS, UNTRAINED
from fleetune.records.run_directory import RunDirectory

if TYPE_CHECKING:
    import pandas as pd

QUALITIES = ("eval_loss", "eval_accuracy")
"""What a quality can be given in."""
SPENDINGS = ("sim_seconds", *(column.name for column in ROUND_COLUMNS if column.has_total))
"""Costs that a run spends round by round, by their columns of ``rounds.parquet``."""
PEAK_MEMORY = "peak_memory_bytes_max"
"""The column of ``rounds.parquet`` with the largest memory that a client of the round needed, refused ones left out."""
DIGITS = 3  # of the common quality, so that what is printed is what was compared with


@dataclass(frozen=True)
class Quality:
    """A quality to come to: a metric and its level."""

    metric: str
    level: float

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.metric in HIGHER_IS_BETTER else -1

    def text(self) -> str:
        """The level as people read it: ``0.134``, or ``48.1 %`` for an accuracy."""
        return f"{100 * self.level:.1f} %" if self.metric in HIGHER_IS_BETTER else f"{self.level:g}"


@dataclass(frozen=True)
class Ending:
    """How a trial began and ended: the metric of the untrained model (NaN: not evaluated) and the last one."""

    untrained: float
    final: float


def learns(trials: Sequence[Ending], sign: int) -> bool:
    """True if a configuration got better than the untrained model: the whole 95 % interval over its seeds, or its only seed."""
    gains = np.array([sign * (trial.final - trial.untrained) for trial in trials])
    found = interval(gains)
    return found.sign > 0 if found is not None else bool((gains > 0).any())


def common_quality(metric: str, configurations: Iterable[Sequence[Ending]]) -> Quality | None:
    """The common quality of a sweep's configurations, by the rule above; None if none of them learns.

    It is rounded to three decimals to the worse side, so that the trial that sets it reaches it.
    """
    sign = Quality(metric, 0.0).sign
    ends = [trial.final for trials in configurations if learns(trials, sign) for trial in trials]
    ends = [end for end in ends if math.isfinite(end)]
    if not ends:
        return None
    scale = 10.0**DIGITS
    worst = min(sign * end for end in ends)
    return Quality(metric, sign * math.floor(worst * scale + 1e-9) / scale)


def spendings(run: RunDirectory) -> pd.DataFrame:
    """A run's rounds with its qualities, and what it has spent since its start. The first row is the untrained model, for
    nothing, if it was evaluated.
    """
    import pandas as pd

    rounds = run.rounds()[["round", *QUALITIES, *SPENDINGS]].astype(float)
    for name in SPENDINGS[1:]:  # virtual time is on record as a sum already
        rounds[name] = rounds[name].cumsum()
    untrained = run.meta.get("baseline")
    if not untrained:
        return rounds
    first = {"round": UNTRAINED, **dict.fromkeys(SPENDINGS, 0.0), **untrained}
    return pd.concat([pd.DataFrame([first]).reindex(columns=rounds.columns).astype(float), rounds], ignore_index=True)


def spent(rounds: pd.DataFrame, cost: str, quality: Quality) -> float:
    """What a run had spent at the first evaluation that came to the quality; NaN if none did. ``rounds``: `spendings`."""
    reached = rounds[quality.sign * (rounds[quality.metric] - quality.level) >= 0]
    return float(reached[cost].iloc[0]) if len(reached) else math.nan


def peak_memory(run: RunDirectory) -> float:
    """The largest memory that a client of the run needed, refused ones left out, in bytes; NaN if nobody worked."""
    return float(run.rounds()[PEAK_MEMORY].astype(float).max())
