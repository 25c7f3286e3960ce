"""Figures of plans, as PNG: memory by part beside budgets, seconds and energy of a turn, totals of all plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.columns import MEMORY_PARTS
from fleetune.plan.summary import by_stage, comparison
from fleetune.plan.walk import Plan, Row
from fleetune.reports.figures.style import BUDGET, PALETTE, PHASE_COLORS, REFUSED, panels
from fleetune.units import scale_of

TOTALS = (
    ("sim_seconds", "Virtual time", "seconds"),
    ("uplink_bytes", "Sent by all clients", "bytes"),
    ("energy_joules", "Energy of all clients", "joules"),
    ("flops", "Computed by all clients", "flops"),
)
MAX_PLANS = 12  # in a figure (assumed: nobody tells more of them apart)


def memory(plan: Plan, path: Path) -> Path:
    """The memory that each stage needs on each class of device, by part, and the budget."""
    rows = by_stage(plan)
    y = np.arange(len(rows))[::-1]
    with panels(path, columns=1, width=8.0, height=_height(rows)) as (ax,):
        left = np.zeros(len(rows))
        divisor, unit = scale_of(max(row["peak_memory_bytes"] for row in rows), "bytes")
        for color, name in zip(PALETTE, MEMORY_PARTS, strict=False):
            part = np.array([row[name] for row in rows]) / divisor
            ax.barh(y, part, left=left, color=color, height=0.62, label=name.removesuffix("_bytes"))
            left += part
        peak = np.array([row["peak_memory_bytes"] for row in rows]) / divisor
        budgets = np.array([row["budget_bytes"] for row in rows]) / divisor
        shown = budgets <= 2.5 * peak.max()  # a server's budget would leave no room for the bars
        if shown.any():
            ax.vlines(budgets[shown], y[shown] - 0.42, y[shown] + 0.42, color=BUDGET, lw=2.2, label="budget")
        for place, need, budget in zip(y, peak, budgets, strict=True):
            if need > budget:
                ax.text(need, place, "  does not fit", va="center", fontsize=8, color=REFUSED)
        ax.set(title=f"Memory that {plan.label} needs", xlabel=unit)
        ax.margins(x=0.14)
        _by_stage_and_device(ax, rows, y)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return path


def turns(plan: Plan, path: Path) -> Path:
    """A client's turn: seconds by phase, and energy."""
    rows = [row for row in by_stage(plan) if row["sim_seconds"] is not None]
    y = np.arange(len(rows))[::-1]
    with panels(path, columns=2, width=6.0, height=_height(rows)) as (seconds, joules):
        left = np.zeros(len(rows))
        for phase, color in PHASE_COLORS.items():
            part = np.array([row[f"{phase}_seconds"] for row in rows])
            if not part.any():  # the server's, which only split learning waits for
                continue
            seconds.barh(y, part, left=left, color=color, height=0.62, label=phase)
            left += part
        seconds.set(title=f"A turn under {plan.label}", xlabel="seconds, mean")
        seconds.legend(loc="lower right")
        joules.barh(y, [row["energy_joules"] for row in rows], color=PALETTE[2], height=0.62)
        joules.set(title="Energy of a turn", xlabel="joules, mean")
        for ax in (seconds, joules):
            _by_stage_and_device(ax, rows, y)
        joules.set_yticklabels([])
    return path


def totals(plans: Sequence[Plan], path: Path) -> Path:
    """The runs' totals beside each other."""
    rows = comparison(plans)[:MAX_PLANS]
    y = np.arange(len(rows))[::-1]
    with panels(path, columns=len(TOTALS), width=3.4, height=_height(rows)) as axes:
        for i, (ax, (name, title, quantity)) in enumerate(zip(axes, TOTALS, strict=True)):
            divisor, unit = scale_of(max(row[name] for row in rows), quantity)
            values = [row[name] / divisor for row in rows]
            ax.barh(y, values, color=[PALETTE[k % len(PALETTE)] for k in range(len(rows))], height=0.62)
            for place, value in zip(y, values, strict=True):
                ax.text(value, place, f" {value:.4g}", va="center", fontsize=8)
            ax.set(title=title, xlabel=unit)
            ax.margins(x=0.2)
            ax.grid(axis="y", visible=False)
            ax.set_yticks(y, [row["plan"] for row in rows] if i == 0 else [""] * len(rows))
    return path


def _height(rows: Sequence[Row]) -> float:
    """Inches for that many bars, axis and title included."""
    return 1.3 + 0.32 * max(3, len(rows))


def _by_stage_and_device(ax: Any, rows: Sequence[Row], y: np.ndarray) -> None:
    """Labels of the bars at ``y (rows,)``, which need no lines between them."""
    ax.grid(axis="y", visible=False)
    ax.set_yticks(y, [f"stage {row['stage']} · {row['device']}" for row in rows])
