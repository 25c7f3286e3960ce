"""Bars of what a turn costs per device class, for one run, several runs or configurations of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fleetune.records.naming import group_labels
from fleetune.records.run_directory import RunDirectory
from fleetune.reports.figures.style import BUDGET, PALETTE, largest, legend, panels
from fleetune.reports.run_stats import device_costs
from fleetune.units import scale_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def cost_by_device(runs: Sequence[RunDirectory], *, path: Path) -> Path:
    """Per device class: time, bytes sent and energy of a turn, peak memory against the budget, fraction refused for memory."""
    groups = dict(list(group_labels(list(runs)).items())[: len(PALETTE)])
    return device_bars({label: _mean_costs(members) for label, members in groups.items()}, path=path)


def device_bars(costs: dict[str, pd.DataFrame], *, path: Path) -> Path:
    """The bars of :func:`cost_by_device`: label -> costs per device class, for no more labels than the palette has."""
    devices = sorted({device for frame in costs.values() for device in frame.index})
    costs = {label: frame.reindex(devices) for label, frame in costs.items()}
    outcomes = [
        ("sim_seconds", "Virtual time of a turn", "seconds"),
        ("flops", "Computing in a turn", "flops"),
        ("uplink_bytes", "Bytes sent in a turn", "bytes"),
        ("energy_joules", "Energy of a turn", "joules"),
        ("peak_memory_bytes", "Peak memory and budget", "bytes"),
        ("oom_fraction", "Turns refused for memory", None),
    ]
    height = 1.4 + 0.36 * len(devices) * max(1, len(costs)) ** 0.6
    with panels(path, columns=3, rows=2, width=3.6, height=height) as axes:
        for i, (ax, (column, title, quantity)) in enumerate(zip(axes, outcomes, strict=True)):
            _bars(ax, costs, devices, column, quantity)
            ax.set_title(title)
            if i % 3:
                ax.set_yticklabels([])
        legend(axes[0].figure, axes[0], costs)
    return path


def _bars(ax: Axes, costs: dict[str, pd.DataFrame], devices: list[str], column: str, quantity: str | None) -> None:
    """Horizontal bars: a cluster per device class, a bar per group; a tick where the memory budget ends."""
    values = {label: frame[column].to_numpy(dtype=float) for label, frame in costs.items()}
    most = max((largest(v) for v in values.values()), default=0.0)
    divisor, unit = scale_of(most, quantity) if quantity else (0.01, "%")
    place, thickness = np.arange(len(devices)), 0.8 / max(1, len(costs))
    for i, (label, v) in enumerate(values.items()):
        y = place + (i - (len(costs) - 1) / 2) * thickness
        ax.barh(y, np.nan_to_num(v) / divisor, height=0.9 * thickness, color=PALETTE[i], label=label)
    if column == "peak_memory_bytes" and costs:
        budget = next(iter(costs.values()))["budget_bytes"].to_numpy(dtype=float) / divisor
        limit = 1.35 * most / divisor  # a budget far beyond the need would squeeze the bars
        for at, b in zip(place.tolist(), budget.tolist(), strict=True):
            if b <= limit:
                ax.plot([b, b], [at - 0.45, at + 0.45], color=BUDGET, lw=2)
            elif math.isfinite(b):
                ax.text(limit, at, f"{b:.0f} →", va="center", ha="right", fontsize=8, color=BUDGET)
        ax.set_xlim(0, limit or 1)
    ax.set_xlim(left=0, right=max(100.0 * most * 1.1, 10.0) if quantity is None else None)
    ax.set(xlabel=unit, yticks=place, yticklabels=devices)
    ax.set_ylim(len(devices) - 0.45, -0.55)
    ax.grid(axis="y", visible=False)


def _mean_costs(members: list[RunDirectory]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([device_costs(run) for run in members]).groupby(level=0).mean()
