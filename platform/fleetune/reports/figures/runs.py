"""Figures of one run or several, as PNG files. Runs that differ in their seed only share a line: mean, and range as a band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune.records.naming import group_labels, varied_fields
from fleetune.records.run_directory import RunDirectory
from fleetune.reports.figures.adapter_pool import adapter_pool
from fleetune.reports.figures.block_groups import block_groups
from fleetune.reports.figures.devices import cost_by_device
from fleetune.reports.figures.style import PALETTE, largest, legend, panels, percent
from fleetune.reports.figures.timeline import timeline
from fleetune.reports.run_stats import RUN_COSTS, rounds_from_the_start, run_totals
from fleetune.units import scale_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    XOf = Callable[[pd.DataFrame], pd.Series]

MAX_GROUPS = 16


def write_figures(run: RunDirectory) -> list[Path]:
    """All figures of one run, into its ``figures/``."""
    folder = run.path / "figures"
    figures = [("learning_curve", learning_curve), ("cost_by_device", cost_by_device)]
    if run.rounds()["eval_accuracy"].notna().any():
        figures.append(("accuracy_vs_cost", accuracy_vs_cost))
    made = [draw([run], path=folder / f"{name}.png") for name, draw in figures]
    of_method = [
        block_groups(run, path=folder / "block_groups.png"),
        adapter_pool(run, path=folder / "adapter_pool.png"),
    ]
    return [*made, timeline(run, path=folder / "timeline.png"), *(figure for figure in of_method if figure)]


def learning_curve(runs: Sequence[RunDirectory], *, path: Path) -> Path:
    """Training loss, evaluation loss and accuracy over rounds; dotted lines mark a single run's stages."""
    from matplotlib.ticker import MaxNLocator

    shown = [
        ("train_loss", "Training loss"),
        ("eval_loss", "Evaluation loss"),
        ("eval_accuracy", "Evaluation accuracy"),
    ]
    groups = _groups(runs)
    evaluated = [
        panel for panel in shown if any(f[panel[0]].notna().any() for frames in groups.values() for f in frames)
    ]
    with panels(path, columns=max(1, len(evaluated))) as axes:
        for ax, (column, title) in zip(axes, evaluated or shown[:1], strict=False):
            ax.set(title=title, xlabel="round")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            _lines(ax, groups, _over("round"), column)
            if column == "eval_accuracy":
                percent(ax)
            if len(runs) == 1:
                _mark_stages(ax, next(iter(groups.values()))[0])
        legend(axes[0].figure, axes[0], groups)
    return path


def accuracy_vs_cost(runs: Sequence[RunDirectory], *, path: Path) -> Path:
    """Accuracy (without evaluation: training loss) against bytes sent, virtual time and energy since the start."""
    groups = _groups(runs)
    evaluated = any(frame["eval_accuracy"].notna().any() for frames in groups.values() for frame in frames)
    column, title = ("eval_accuracy", "Evaluation accuracy") if evaluated else ("train_loss", "Training loss")
    costs = [
        ("uplink_total", RUN_COSTS["uplink_bytes"]),
        ("sim_seconds", RUN_COSTS["sim_seconds"]),
        ("energy_total", RUN_COSTS["energy_joules"]),
    ]
    with panels(path, columns=3) as axes:
        for ax, (name, cost) in zip(axes, costs, strict=True):
            most = max((largest(frame[name]) for frames in groups.values() for frame in frames), default=0.0)
            divisor, unit = scale_of(most, cost.unit)
            ax.set(title=f"{title} against {cost.title}", xlabel=f"{cost.title} ({unit})")
            _lines(ax, groups, _over(name, divisor), column)
            if evaluated:
                percent(ax)
        legend(axes[0].figure, axes[0], groups)
    return path


def sweep_effect(runs: Sequence[RunDirectory], *, path: Path) -> Path | None:
    """The effect of each swept field on accuracy, virtual time, uplink and energy; None if no number or name was varied.

    A dot is a run, the line the mean of the runs with that value.
    """
    fields = {k: v for k, v in varied_fields(list(runs)).items() if all(isinstance(x, int | float | str) for x in v)}
    fields = dict(list(fields.items())[:4])
    if not fields:
        return None
    totals = [run_totals(run) for run in runs]
    costs = [RUN_COSTS[name] for name in ("sim_seconds", "uplink_bytes", "energy_joules")]
    outcomes = [(cost.name, cost.title, cost.unit) for cost in costs]
    score = "eval_accuracy" if any(t["eval_accuracy"] is not None for t in totals) else "train_loss"
    with panels(path, columns=4, rows=len(fields)) as axes:
        for row, (field, values) in enumerate(fields.items()):
            for column, (name, title, quantity) in enumerate([(score, score.replace("_", " "), None), *outcomes]):
                y = np.array([np.nan if t[name] is None else t[name] for t in totals], dtype=float)
                divisor, unit = scale_of(largest(y), quantity) if quantity else (1.0, "")
                ax = axes[4 * row + column]
                _effect(ax, values, y / divisor)
                ax.set(title=f"{title} ({unit})" if unit else title, xlabel=field)
                if name == "eval_accuracy":
                    percent(ax)
    return path


# ---------------------------------------------------------------------- parts of a figure


def _groups(runs: Sequence[RunDirectory]) -> dict[str, list[pd.DataFrame]]:
    """Label -> the rounds of its runs, with the totals since the start."""
    groups = {}
    for label, members in list(group_labels(list(runs)).items())[:MAX_GROUPS]:
        groups[label] = [rounds_from_the_start(run) for run in members]
    return groups


def _over(column: str, divisor: float = 1.0) -> XOf:
    """Returns the horizontal values of a line: a column, in larger units."""
    return lambda frame: frame[column] / divisor


def _lines(ax: Axes, groups: dict[str, list[pd.DataFrame]], x_of: XOf, column: str) -> None:
    """One line per group: the mean of its runs round by round, and their range."""
    import pandas as pd

    drawn = 0
    for i, (label, frames) in enumerate(groups.items()):
        finite = [frame[frame[column].notna()] for frame in frames]
        y = pd.concat([f.set_index("round")[column] for f in finite], axis=1) if finite else pd.DataFrame()
        x = pd.concat([x_of(f).set_axis(f["round"]) for f in finite], axis=1).mean(axis=1)
        if y.empty:
            continue
        color, style = PALETTE[i % len(PALETTE)], "-" if i < len(PALETTE) else "--"
        marker = "o" if len(y) <= 25 else None
        ax.plot(x, y.mean(axis=1), style, color=color, marker=marker, ms=3.5, label=label)
        if y.shape[1] > 1:
            ax.fill_between(x, y.min(axis=1), y.max(axis=1), color=color, alpha=0.15, lw=0)
        drawn += 1
    if not drawn:
        ax.text(0.5, 0.5, "no client could train", transform=ax.transAxes, ha="center", color="#777777")


def _effect(ax: Axes, values: list[Any], y: np.ndarray) -> None:
    ordered = sorted(set(values), key=lambda v: (isinstance(v, str), v))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in ordered)
    x = np.array([float(v) if numeric else ordered.index(v) for v in values])
    ax.plot(x, y, "o", color=PALETTE[0], alpha=0.45, ms=5)
    at = np.unique(x)
    ax.plot(
        at,
        [np.nanmean(y[x == a]) if np.isfinite(y[x == a]).any() else np.nan for a in at],
        "-",
        color=PALETTE[0],
    )
    if numeric and at[0] > 0 and at[-1] / at[0] >= 8:
        ax.set_xscale("log", base=2)
    if len(at) <= 10:
        ax.set_xticks(at, [f"{v:g}" if numeric else str(v) for v in ordered], rotation=0 if numeric else 20)
        ax.minorticks_off()


def _mark_stages(ax: Axes, frame: pd.DataFrame) -> None:
    stage = frame["stage"].to_numpy(dtype=float)
    for i in np.flatnonzero(stage[1:] != stage[:-1]) if np.isfinite(stage).all() else ():
        ax.axvline(frame["round"].iloc[i + 1] - 0.5, color="#999999", lw=0.9, ls=":")
