"""Figures of a sweep's outcome: curves, Pareto front, the protocols. One colour per configuration, the same in all;
beyond eight, the best eight are coloured and the others grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fleetune.reports.figures.style import GREY, PALETTE, largest, panels, percent, plain_log
from fleetune.reports.sweep_results import COSTS, SweepResults, amount
from fleetune.reports.sweep_stats import SCORES, mean_curve, over_seeds, pareto_front, quality_under_budget
from fleetune.units import scale_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_ROWS = 16  # configurations in a figure with a line of text each


def shown_configurations(results: SweepResults, count: int = len(PALETTE)) -> list[str]:
    """The best ``count`` configurations, best first."""
    return [str(configuration) for configuration in results.ranking.index[:count]]


def curves(results: SweepResults, *, path: Path) -> Path:
    """Score and training loss over rounds, virtual time and bytes sent: means over seeds, their range as a band."""
    from matplotlib.ticker import MaxNLocator

    scores = [s for s in SCORES if results.curves[s.column].notna().any()]
    scores = [results.score, *(s for s in scores if s.column == "train_loss" and s != results.score)]
    most = {cost.column: largest(results.curves[cost.column]) for cost in COSTS[:2]}
    overs = [("round", "round", 1.0)]
    for cost in (COSTS[1], COSTS[0]):
        divisor, unit = scale_of(most[cost.column], cost.quantity)
        overs.append((cost.column, f"{cost.title} ({unit})", divisor))
    with panels(path, columns=3, rows=len(scores)) as axes:
        for i, ax in enumerate(axes):
            score, (over, name, divisor) = scores[i // 3], overs[i % 3]
            lines = mean_curve(results.curves, score.column, over)
            ax.set(xlabel=name, title=f"{score.title.capitalize()} over {name.partition(' (')[0]}")
            for label, line, look in _looks(results, lines):
                ax.plot(line["x"] / divisor, line["mean"], label=label, **look)
                if (line["high"] > line["low"]).any() and look["color"] != GREY:
                    x = line["x"] / divisor
                    ax.fill_between(x, line["low"], line["high"], color=look["color"], alpha=0.15, lw=0)
            if over == "round":
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if score.is_fraction:
                percent(ax)
        _legend(axes)
    return path


def pareto(results: SweepResults, *, path: Path) -> Path:
    """Score against each cost: the front connected and numbered by rank, all others grey."""
    table, score = results.ranking, results.score
    with panels(path, columns=len(COSTS), width=4.6, height=4.0) as axes:
        for ax, cost in zip(axes, COSTS, strict=True):
            divisor, unit = scale_of(largest(table[cost.column]), cost.quantity)
            x, y = table[cost.column].to_numpy(dtype=float) / divisor, table["score"].to_numpy(dtype=float)
            front = pareto_front(x, y, higher_is_better=score.higher_is_better)
            spread = table["spread"].fillna(0.0).to_numpy(dtype=float)
            ax.errorbar(x, y, yerr=spread, fmt="none", ecolor=GREY, elinewidth=1)
            if not front.all():
                ax.plot(x[~front], y[~front], "o", mfc="white", mec="#9A9A9A", ms=6, label="dominated")
            order = np.argsort(x[front], kind="stable")
            line: Any = {"drawstyle": "steps-post", "color": PALETTE[0], "ms": 7, "label": "Pareto front"}
            ax.plot(x[front][order], y[front][order], "o-", **line)
            ax.set(title=f"{score.title.capitalize()} against {cost.title}", xlabel=f"{cost.title} ({unit})")
            ax.margins(x=0.12, y=0.12)
            _spread_out(ax, x)
            if score.is_fraction:
                percent(ax)
        figure: Any = axes[0].figure
        figure.draw_without_rendering()
        for ax, cost in zip(axes, COSTS, strict=True):
            divisor, _ = scale_of(largest(table[cost.column]), cost.quantity)
            x = table[cost.column].to_numpy(dtype=float) / divisor
            y = table["score"].to_numpy(dtype=float)
            front = pareto_front(x, y, higher_is_better=score.higher_is_better)
            _number(ax, x[front], y[front], [f"#{rank}" for rank in table["rank"][front]], above=score.higher_is_better)
        _legend(axes)
    return path


def budgets(results: SweepResults, chosen: dict[str, list[float]], *, path: Path) -> Path:
    """The best score reached within any budget, per cost; dotted lines are the budgets of the table."""
    score = results.score
    with panels(path, columns=len(COSTS)) as axes:
        for ax, cost in zip(axes, COSTS, strict=True):
            most = max([largest(results.curves[cost.column]), *chosen[cost.column]])
            divisor, unit = scale_of(most, cost.quantity)
            costs = results.curves.loc[results.curves[cost.column] > 0, cost.column]
            grid = np.geomspace(float(costs.min()), most, 160) if len(costs) else np.array([1.0])
            values = quality_under_budget(results.curves, score, cost.column, grid.tolist())
            means, _ = over_seeds(values, results.trials["configuration"])
            lines = (
                means.rename_axis("configuration").reset_index().melt("configuration", var_name="x", value_name="mean")
            )
            for label, line, look in _looks(results, lines):
                look = {**look, "marker": None, "drawstyle": "steps-post"}
                ax.plot(line["x"].astype(float) / divisor, line["mean"], label=label, **look)
            for budget in chosen[cost.column]:
                ax.axvline(budget / divisor, color="#777777", lw=0.9, ls=":")
            ax.set(title=f"Best {score.title} within a budget", xlabel=f"{cost.title} ({unit})")
            plain_log(ax)
            if score.is_fraction:
                percent(ax)
        _legend(axes)
    return path


def targets(results: SweepResults, reached: dict[str, tuple[pd.DataFrame, pd.DataFrame]], *, path: Path) -> Path:
    """The cost of the best configurations at the first evaluation that reached each target (mean over seeds).

    ``reached``: cost column -> (means, numbers of trials), index configuration, a column per target. Hollow: not by all.
    """
    rows = shown_configurations(results, MAX_ROWS)
    num_trials = results.ranking["num_trials"].reindex(rows).to_numpy()
    with panels(path, columns=len(COSTS), width=3.9, height=1.5 + 0.28 * len(rows)) as axes:
        for i, (ax, cost) in enumerate(zip(axes, COSTS, strict=True)):
            means, counts = (table.reindex(rows) for table in reached[cost.column])
            by_all = counts.to_numpy() == num_trials[:, None]
            divisor, unit = scale_of(largest(means), cost.quantity)
            place = np.arange(len(rows))
            costs = means.to_numpy(dtype=float) / divisor  # (configurations, targets), NaN: not reached
            if np.isfinite(costs).any():
                first, last = np.nanmin(costs, axis=1, initial=np.inf), np.nanmax(costs, axis=1, initial=-np.inf)
                seen = np.isfinite(first) & np.isfinite(last)
                ax.hlines(place[seen], first[seen], last[seen], color=GREY, lw=2)
            for j, target in enumerate(means.columns):
                look: Any = {"color": PALETTE[j % len(PALETTE)], "label": amount(float(str(target)), results.score)}
                look |= {"marker": MARKERS[j % len(MARKERS)], "ms": 6, "ls": ""}
                ax.plot(np.where(by_all[:, j], costs[:, j], np.nan), place, **look)
                ax.plot(np.where(by_all[:, j], np.nan, costs[:, j]), place, **{**look, "mfc": "white", "label": None})
            names = [results.label(c) for c in rows] if i == 0 else [""] * len(rows)
            ax.set(
                title=f"{cost.title.capitalize()} to a target",
                xlabel=f"{cost.title} ({unit})",
                ylim=(len(rows) - 0.5, -0.5),
            )
            ax.set_yticks(place, names)
            _spread_out(ax, costs[np.isfinite(costs)])
        _legend(axes, title=results.score.title)
    return path


def robustness(results: SweepResults, means: pd.DataFrame, field: str, *, path: Path) -> Path:
    """Score over the values of ``field`` (drop-out), a line per configuration without it: index of ``means``."""
    best = means.max(axis=1) if results.score.higher_is_better else -means.min(axis=1)
    order = list(best.sort_values(ascending=False, kind="stable").index)
    with panels(path, columns=1, width=7.5, height=3.8) as (ax,):
        for i, configuration in reversed(list(enumerate(order))):
            look = _look(i)
            label = str(configuration) if i < len(PALETTE) else None
            ax.plot(means.columns.astype(float), means.loc[configuration], label=label, **look)
        ax.set(title=f"{results.score.title.capitalize()} under {field}", xlabel=field)
        if results.score.is_fraction:
            percent(ax)
        _legend([ax], reverse=True)
    return path


# ---------------------------------------------------------------------- parts of a figure


def _looks(results: SweepResults, lines: pd.DataFrame) -> list[tuple[str | None, pd.DataFrame, dict[str, Any]]]:
    """(label, line, look) of each configuration, the best one drawn last; only the first grey line has a label."""
    order = shown_configurations(results, len(results.ranking))
    num_grey = len(order) - len(PALETTE)
    found = []
    for i, configuration in reversed(list(enumerate(order))):
        line = lines[lines["configuration"] == configuration]
        others = f"{num_grey} more" if i == len(order) - 1 else None
        label = results.label(configuration) if i < len(PALETTE) else others
        look = _look(i)
        if len(line) > 25 or i >= len(PALETTE):
            look["marker"] = None
        found.append((label, line, look))
    return found


def _look(i: int) -> dict[str, Any]:
    if i >= len(PALETTE):
        return {"color": GREY, "lw": 0.9, "zorder": 1.5}
    return {"color": PALETTE[i], "marker": MARKERS[i], "ms": 4}


def _legend(axes: Sequence[Axes], *, title: str | None = None, reverse: bool = True) -> None:
    """One legend below all panels, best configuration first; as many columns as its words leave room for."""
    handles, labels = axes[0].get_legend_handles_labels()
    if title is None and reverse:
        handles, labels = handles[::-1], labels[::-1]
    if not labels:
        return
    figure: Any = axes[0].figure
    room = figure.get_size_inches()[0] / (0.6 + 0.075 * max(len(label) for label in labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(4, int(room))), title=title)


def _number(ax: Axes, x: np.ndarray, y: np.ndarray, texts: Sequence[str], *, above: bool) -> None:
    """A text beside each point, at the first place around it where it covers neither a text nor a point.

    Left of a point, on the side of better scores, there is nothing: else it would not be on the front.
    """
    from matplotlib.patheffects import withStroke

    scale = ax.figure.dpi / 72
    points = ax.transData.transform(np.column_stack([x, y])) / scale  # in points, 1/72 inch
    taken: list[tuple[float, float, float, float]] = [(px - 4, py - 4, px + 4, py + 4) for px, py in points]
    for (px, py), at_x, at_y, text in zip(points, x, y, texts, strict=True):
        width, up, down = 6.5 * len(text), 5, -14
        near, far = (up, down) if above else (down, up)
        for dx, dy in ((-4 - width, near), (6, near), (6, far), (-4 - width, far), (-4 - width, 2.5 * near)):
            box = (px + dx, py + dy, px + dx + width, py + dy + 10)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        taken.append(box)
        halo = [withStroke(linewidth=2.5, foreground="white")]
        look: Any = {
            "textcoords": "offset points",
            "fontsize": 9,
            "color": "#004C7A",
            "path_effects": halo,
            "zorder": 5,
        }
        ax.annotate(text, (at_x, at_y), xytext=(dx, dy), **look)


def _spread_out(ax: Axes, x: np.ndarray) -> None:
    """A logarithmic axis where values differ more than twentyfold."""
    positive = x[np.isfinite(x) & (x > 0)]
    if len(positive) and positive.max() > 20 * positive.min():
        plain_log(ax)
