"""Figures of plans, as PNG: memory by part against budgets, seconds and energy of a turn, totals side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.columns import MEMORY_PARTS
from fleetune.plan.summary import by_stage, comparison
from fleetune.plan.walk import Plan, Row
from fleetune.reports.figures.style import BUDGET, PALETTE, PHASE_COLORS, REFUSED, STYLE
from fleetune.units import scale_of

TOTALS = (
    ("sim_seconds", "Virtual time", "seconds"),
    ("uplink_bytes", "Sent by all clients", "bytes"),
    ("energy_joules", "Energy of all clients", "joules"),
    ("flops", "Computed by all clients", "flops"),
)
MAX_PLANS = 12  # in a figure; assumed: more cannot be told apart


def memory(plan: Plan, path: Path) -> Path:
    """What each stage needs on each class of device, by part, and the budget."""
    rows = by_stage(plan)
    figure, axes = _figure(rows, columns=1, width=8.0)
    ax = axes[0]
    y = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    divisor, unit = scale_of(max(row["peak_memory_bytes"] for row in rows), "bytes")
    for color, name in zip(PALETTE, MEMORY_PARTS, strict=False):
        part = np.array([row[name] for row in rows]) / divisor
        ax.barh(y, part, left=left, color=color, height=0.62, label=name.removesuffix("_bytes"))
        left += part
    peak = np.array([row["peak_memory_bytes"] for row in rows]) / divisor
    budgets = np.array([row["budget_bytes"] for row in rows]) / divisor
    shown = budgets <= 2.5 * peak.max()
    if shown.any():
        ax.vlines(budgets[shown], y[shown] - 0.42, y[shown] + 0.42, color=BUDGET, lw=2.2, label="budget")
    for place, need, budget in zip(y, peak, budgets, strict=True):
        if need > budget:
            ax.text(need, place, "  does not fit", va="center", fontsize=8, color=REFUSED)
    ax.set(title=f"Memory that {plan.label} needs", xlabel=unit)
    ax.margins(x=0.14)
    _ticks(ax, rows, y)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def turns(plan: Plan, path: Path) -> Path:
    """A client's turn: seconds by phase, and energy."""
    rows = [row for row in by_stage(plan) if row["sim_seconds"] is not None]
    figure, axes = _figure(rows, columns=2, width=6.0)
    y = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    for phase, color in PHASE_COLORS.items():
        part = np.array([row[f"{phase}_seconds"] for row in rows])
        if not part.any():  # the server's, which only split learning waits for
            continue
        axes[0].barh(y, part, left=left, color=color, height=0.62, label=phase)
        left += part
    axes[0].set(title=f"A turn under {plan.label}", xlabel="seconds, mean")
    axes[0].legend(loc="lower right")
    axes[1].barh(y, [row["energy_joules"] for row in rows], color=PALETTE[2], height=0.62)
    axes[1].set(title="Energy of a turn", xlabel="joules, mean")
    for ax in axes:
        _ticks(ax, rows, y)
    axes[1].set_yticklabels([])
    return _save(figure, path)


def totals(plans: Sequence[Plan], path: Path) -> Path:
    """What the runs come to, beside each other."""
    rows = comparison(plans)[:MAX_PLANS]
    figure, axes = _figure(rows, columns=len(TOTALS), width=3.4)
    y = np.arange(len(rows))[::-1]
    for i, (ax, (name, title, quantity)) in enumerate(zip(axes, TOTALS, strict=True)):
        divisor, unit = scale_of(max(row[name] for row in rows), quantity)
        values = [row[name] / divisor for row in rows]
        ax.barh(y, values, color=[PALETTE[k % len(PALETTE)] for k in range(len(rows))], height=0.62)
        for place, value in zip(y, values, strict=True):
            ax.text(value, place, f" {value:.4g}", va="center", fontsize=8)
        ax.set(title=title, xlabel=unit)
        ax.margins(x=0.2)
        ax.set_yticks(y, [row["plan"] for row in rows] if i == 0 else [""] * len(rows))
    return _save(figure, path)


def _figure(rows: Sequence[Row], *, columns: int, width: float) -> tuple[Any, list[Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, 1.3 + 0.32 * max(3, len(rows))), layout="constrained")
        axes = list(figure.subplots(1, columns, squeeze=False).flat)
    for ax in axes:
        ax.grid(axis="y", visible=False)
    return figure, axes


def _ticks(ax: Any, rows: Sequence[Row], y: np.ndarray) -> None:
    ax.set_yticks(y, [f"stage {row['stage']} · {row['device']}" for row in rows])


def _save(figure: Any, path: Path) -> Path:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", bbox_inches="tight")
    return path
