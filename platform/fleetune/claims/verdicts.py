"""The verdict on every claim of a sweep: it holds, it is reversed, or so many trials do not decide it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from fleetune.claims.config import AnyClaim, Better, Peak, Ratio, Trend, read, setting_text
from fleetune.claims.measures import Measures
from fleetune.claims.pairs import Comparison, cells_of, check, compared, key_of, seeds_of
from fleetune.claims.statistics import Floats, Interval, by_seed, differences, interval, log_ratios, slopes
from fleetune.columns import HIGHER_IS_BETTER, ROUND_COLUMNS, TRIAL_COLUMNS
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.units import NOTHING, readable

Word = Literal["holds", "reversed", "not decided"]
WORDS: tuple[Word, ...] = ("holds", "reversed", "not decided")
UNITS = {column.name: column.unit for column in (*ROUND_COLUMNS, *TRIAL_COLUMNS)}
FEW_SEEDS = 5  # below, the t quantile is above 2.7, and one unusual seed decides


@dataclass(frozen=True)
class Verdict:
    """What a sweep says about a claim. The numbers are None where fewer than two seeds have a pair."""

    claim: str
    """The claim in words."""
    source: str | None
    metric: str
    """The metric's column of ``trials.parquet``."""
    verdict: Word
    quantity: Literal["difference", "change per value", "ratio"]
    """What ``mean`` and the interval are: a difference in the metric's unit, its change from one value of the field to the next,
    or a ratio."""
    mean: float | None
    low: float | None
    high: float | None
    """The interval at 95 %."""
    smallest_decidable: float | None
    """The smallest difference that would have been decided with this spread and so many seeds: half the interval's length."""
    num_seeds: int
    num_pairs: int
    num_left_out: int
    """Trials that the claim needs and that are not finished, have no value of the metric, or never came to its quality."""
    remark: str | None = None
    """What the reader should know beside the numbers."""

    def line(self) -> str:
        """The verdict in a line, for the terminal and for MLflow."""
        source = f" ({self.source})" if self.source else ""
        left_out = f", {self.num_left_out} trial(s) left out" if self.num_left_out else ""
        numbers = f"{self.mean_text()} {self.interval_text()}, " if self.mean is not None else ""
        remark = f"; {self.remark}" if self.remark else ""
        return f"{self.verdict}: {self.claim}{source}: {numbers}{self.num_seeds} seed(s){left_out}{remark}"

    def mean_text(self) -> str:
        """The mean with its unit."""
        return self._text(self.mean)

    def interval_text(self) -> str:
        """The interval with its unit: ``[+1.2 pp, +3.4 pp]``, in percentage points of accuracy."""
        return f"[{self._text(self.low)}, {self._text(self.high)}]"

    def smallest_text(self) -> str:
        """The smallest difference that would have been decided, with its unit."""
        return self._text(self.smallest_decidable).lstrip("+")

    def _text(self, value: float | None) -> str:
        if value is None:
            return NOTHING
        if self.quantity == "ratio":
            return f"{value:.3g}"
        if self.metric.endswith("accuracy"):
            return f"{100 * value:+.1f} pp"
        if not UNITS[self.metric]:
            return f"{value:+.3g}"
        return ("-" if value < 0 else "+") + readable(abs(value), UNITS[self.metric])


def verdicts_of(sweep: SweepDirectory) -> list[Verdict]:
    """The verdicts on a sweep's claims, in their order, from its table as it is now; empty if it has none.

    Raises UserError if its claims do not fit its grid, which can be the case if ``sweep.yaml`` was edited.
    """
    spec = sweep.spec
    claims, grid, seeds = read(spec.get("claims") or []), spec.get("grid"), spec.get("seeds")
    check(claims, grid, seeds)
    if not claims:
        return []
    cells, known_seeds, measures = cells_of(grid or {}), seeds_of(grid or {}, seeds), Measures(sweep.rows())
    places = {key_of(cell): place for place, cell in enumerate(cells)}
    found = []
    for i, claim in enumerate(claims):
        comparison = compared(claim, cells, field=f"claims.{i}")
        values = _values(measures, claim, places, known_seeds)
        found.append(verdict_on(claim, comparison, values, remark=measures.remark(claim)))
    return found


def summary(verdicts: Iterable[str]) -> str:
    """How many claims came out how: ``holds 2, not decided 1``."""
    counts = Counter(verdicts)
    return ", ".join(f"{word} {counts[word]}" for word in WORDS if counts[word])


def as_dicts(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The verdicts as plain data, for ``--json`` and ``claims.json``, each with its line."""
    return [{**asdict(verdict), "line": verdict.line()} for verdict in verdicts]


def verdict_on(claim: AnyClaim, comparison: Comparison, values: Floats, *, remark: str | None = None) -> Verdict:
    """The verdict on one claim. ``values`` ``[C, N]``: the metric of each cell and seed, NaN where it is not known. ``remark``:
    what is to be said beside the outcome's own.
    """
    results = values[np.array(comparison.groups)]  # [G, S, N]
    if isinstance(claim, Better):
        outcome = _better(claim, results)
    elif isinstance(claim, Ratio):
        outcome = _ratio(claim, results)
    elif isinstance(claim, Peak):
        outcome = _peak(comparison, results)
    else:
        outcome = _trend(claim, comparison, results)
    found = outcome.interval
    return Verdict(
        claim=claim.sentence(),
        source=claim.source,
        metric=claim.column,
        verdict=outcome.word,
        quantity=outcome.quantity,
        mean=found.mean if found else None,
        low=found.low if found else None,
        high=found.high if found else None,
        smallest_decidable=found.half_width if found else None,
        num_seeds=int(np.isfinite(by_seed(outcome.pairs)).sum()),
        num_pairs=int(np.isfinite(outcome.pairs).sum()),
        num_left_out=int((~np.isfinite(results)).sum()),
        remark="; ".join(filter(None, (remark, _remark(outcome)))) or None,
    )


@dataclass(frozen=True)
class _Outcome:
    """A verdict with the numbers that it rests on."""

    word: Word
    interval: Interval | None
    pairs: Floats
    """``[G, N]``: a number for every combination of all else and every seed; NaN where a trial is missing."""
    quantity: Literal["difference", "change per value", "ratio"] = "difference"
    remark: str | None = None


def _better(claim: Better, results: Floats) -> _Outcome:
    """The interval of the difference lies wholly on the better side of zero, or on the worse one."""
    pairs = differences(results, 0, 1)
    found = interval(by_seed(pairs))
    sign = 1 if claim.column in HIGHER_IS_BETTER else -1
    return _Outcome(_by_sign(found, sign), found, pairs)


def _ratio(claim: Ratio, results: Floats) -> _Outcome:
    """The interval of the geometric mean lies wholly within the tolerance, or wholly outside of it."""
    pairs = log_ratios(results)
    found = interval(by_seed(pairs))
    if found is None:
        return _Outcome("not decided", None, pairs, "ratio")
    found = Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.num_seeds)
    # The tolerance's ends belong to it: a last digit of a sum must not decide.
    slack = 1e-9 * claim.ratio.value
    low, high = claim.ratio.value - claim.ratio.within - slack, claim.ratio.value + claim.ratio.within + slack
    is_inside, is_outside = low <= found.low and found.high <= high, found.high < low or found.low > high
    return _Outcome("holds" if is_inside else "reversed" if is_outside else "not decided", found, pairs, "ratio")


def _trend(claim: Trend, comparison: Comparison, results: Floats) -> _Outcome:
    """The interval of the slope decides, unless two neighbours decidedly go against it: then the line is no summary."""
    pairs = slopes(results)
    found = interval(by_seed(pairs))
    word = _by_sign(found, claim.SIGN)
    if found is None or word == "not decided":
        return _Outcome(word, found, pairs, "change per value")
    for j in range(len(comparison.settings) - 1):
        step = interval(by_seed(differences(results, j + 1, j)))
        if step is not None and step.sign == -found.sign:
            ends = " to ".join(setting_text(comparison.settings[k]) for k in (j, j + 1))
            remark = f"not monotone: it {'rises' if step.sign > 0 else 'falls'} from {ends}"
            return _Outcome("not decided", found, pairs, "change per value", remark)
    return _Outcome(word, found, pairs, "change per value")


def _peak(comparison: Comparison, results: Floats) -> _Outcome:
    """The claimed value is decidedly above each other one, or some other one is decidedly above it.

    Shown is the difference to the rival that counts: one that is decidedly above it, else the highest.
    """
    measured: list[tuple[Interval, Floats, str]] = []
    unmeasured: list[tuple[Floats, str]] = []
    for j in range(1, len(comparison.settings)):
        pairs, beside = differences(results, 0, j), f"beside {setting_text(comparison.settings[j])}"
        found = interval(by_seed(pairs))
        if found is None:
            unmeasured.append((pairs, beside))
        else:
            measured.append((found, pairs, beside))
    above = [rival for rival in measured if rival[0].sign < 0]
    if unmeasured and not above:  # one rival above it refutes the claim, but all have to be below it
        pairs, beside = unmeasured[0]
        return _Outcome("not decided", None, pairs, remark=beside)
    closest, pairs, beside = min(above or measured, key=lambda rival: rival[0].mean)
    is_highest = all(rival[0].sign > 0 for rival in measured)
    return _Outcome("reversed" if above else "holds" if is_highest else "not decided", closest, pairs, remark=beside)


def _by_sign(found: Interval | None, sign: int) -> Word:
    if found is None or found.sign == 0:
        return "not decided"
    return "holds" if found.sign == sign else "reversed"


def _remark(outcome: _Outcome) -> str | None:
    """What was remarked, and a warning where the seeds are few."""
    num_seeds = outcome.interval.num_seeds if outcome.interval else 0
    remarks = [outcome.remark] if outcome.remark else []
    if num_seeds == 0:
        remarks.append("an interval needs two seeds with all trials of a pair")
    elif num_seeds < FEW_SEEDS:
        remarks.append(f"only {num_seeds} seeds")
    return "; ".join(remarks) or None


def _values(measures: Measures, claim: AnyClaim, places: Mapping[Any, int], seeds: Sequence[int]) -> Floats:
    """A claim's number of every cell and seed ``[C, N]``; NaN for a trial that is not finished or has none."""
    values = np.full((len(places), len(seeds)), np.nan)
    for row in measures.rows:
        place = places.get(key_of(row["overrides"]))
        if place is not None and row["seed"] in seeds:
            values[place, seeds.index(row["seed"])] = measures.value(claim, row)
    return values
