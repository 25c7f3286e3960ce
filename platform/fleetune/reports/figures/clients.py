"""The figures of a run's client profile: what turns cost by device class, who bounds the rounds, memory by part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune.reports.client_stats import MEMORY_PARTS, PHASES, REFUSED, bounds, memory_parts
from fleetune.reports.figures.style import BUDGET, GREY, PALETTE, PHASE_COLORS, largest, panels
from fleetune.units import scale_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PART_COLORS = dict(zip(MEMORY_PARTS, ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), strict=True))
MEDIAN = "#D55E00"
MAX_BARS = 60


def distributions(clients: pd.DataFrame, *, path: Path) -> Path:
    """Time, energy, bytes and memory of the turns that started, a box per device class; dots are single turns."""
    started = clients[~clients["status"].isin(REFUSED)]
    started = started.assign(link_bytes=started["downlink_bytes"] + started["uplink_bytes"])
    devices = sorted(clients["device"].unique())
    shown = [
        ("sim_seconds", "Time of a turn", "seconds"),
        ("energy_joules", "Energy of a turn", "joules"),
        ("link_bytes", "Bytes of a turn, both ways", "bytes"),
        ("peak_memory_bytes", "Peak memory", "bytes"),
    ]
    with panels(path, columns=4, width=3.4, height=1.3 + 0.42 * len(devices)) as axes:
        for i, (ax, (column, title, quantity)) in enumerate(zip(axes, shown, strict=True)):
            values = [started.loc[started["device"] == device, column].to_numpy(dtype=float) for device in devices]
            everything = np.concatenate(values) if values else np.zeros(0)
            divisor, unit = scale_of(largest(everything), quantity)
            _boxes(ax, [v / divisor for v in values])
            positive = everything[everything > 0]
            if len(positive) and positive.max() / positive.min() > 30:
                ax.set_xscale("log")
            else:
                ax.set_xlim(left=0, right=1.08 * largest(everything) / divisor or 1)
            ax.set(title=title, xlabel=unit, yticks=range(len(devices)), yticklabels=devices if i == 0 else [])
            ax.set_ylim(len(devices) - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
    return path


def bounding(clients: pd.DataFrame, *, path: Path) -> Path:
    """The client that each round waits for: its turn by phase, and how often each device class was it."""
    slowest = bounds(clients)
    devices = sorted(clients["device"].unique())
    with panels(path, columns=2, width=6.4, height=2.0 + 0.3 * len(devices)) as (ax, share):
        step = -(-max(1, len(slowest)) // MAX_BARS)
        shown = slowest.iloc[::step]
        divisor, unit = scale_of(largest(slowest["sim_seconds"]), "seconds")
        bottom = np.zeros(len(shown))
        for phase in PHASES:
            height = shown[phase].to_numpy(dtype=float) / divisor
            if height.any():
                look: Any = {"color": PHASE_COLORS[phase], "width": 0.9 * step, "label": phase}
                ax.bar(shown.index, height, bottom=bottom, **look)
                bottom = bottom + height
        every = "" if step == 1 else f", every {step}th round"
        ax.set(title=f"Slowest turn of each round{every}", xlabel="round", ylabel=f"turn ({unit})")
        ax.grid(axis="x", visible=False)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.25), ncols=4)
        counts = slowest.groupby(["device", "longest"]).size().unstack(fill_value=0).reindex(devices, fill_value=0)
        left = np.zeros(len(devices))
        for phase in (p for p in PHASES if p in counts):
            width = 100 * counts[phase].to_numpy(dtype=float) / max(1, len(slowest))
            share.barh(devices, width, left=left, color=PHASE_COLORS[phase], height=0.7)
            left = left + width
        share.set(title="Rounds that wait for a device class, by its longest phase", xlabel="% of rounds")
        share.set_ylim(len(devices) - 0.5, -0.5)
        share.grid(axis="y", visible=False)
    return path


def memory(clients: pd.DataFrame, *, path: Path) -> Path:
    """The parts of each device class's largest need, beside its budget."""
    parts = memory_parts(clients)
    with panels(path, columns=1, width=9.0, height=1.5 + 0.45 * len(parts)) as (ax,):
        need = parts["peak_memory_bytes"].to_numpy(dtype=float)
        divisor, unit = scale_of(largest(need), "bytes")
        left, place = np.zeros(len(parts)), np.arange(len(parts))
        for name in MEMORY_PARTS:
            width = parts[name].fillna(0.0).to_numpy(dtype=float) / divisor
            look: Any = {"color": PART_COLORS[name], "height": 0.62, "label": name.removesuffix("_bytes")}
            ax.barh(place, width, left=left, **look)
            left = left + width
        rest = np.maximum(need / divisor - left, 0.0)
        if largest(rest) > 0.01 * largest(left):
            ax.barh(place, rest, left=left, color=GREY, height=0.62, label="other")
        room = 1.25 * max(largest(left), largest(need) / divisor)
        for at, budget in zip(place.tolist(), (parts["budget_bytes"] / divisor).tolist(), strict=True):
            if budget <= room:
                ax.plot([budget] * 2, [at - 0.42, at + 0.42], color=BUDGET, lw=2.4)
            else:
                ax.text(room, at, f"budget {budget:,.0f} {unit} →", va="center", ha="right", fontsize=9, color=BUDGET)
        ax.plot([], [], color=BUDGET, lw=2.4, label="budget")
        ax.set(title="Largest need of a turn, and budget", xlabel=unit, yticks=place, yticklabels=parts.index)
        ax.set_xlim(0, room or 1)
        ax.set_ylim(len(parts) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.35 / max(1, 0.5 * len(parts))), ncols=7)
    return path


def _boxes(ax: Axes, values: list[np.ndarray]) -> None:
    """A box per class (quartiles, whiskers from least to most) over its single values, at most 200 of them."""
    for i, v in enumerate(values):
        if not len(v):
            ax.text(0.02, i, "none started", va="center", color="#777777", transform=ax.get_yaxis_transform())
            continue
        dots = np.sort(v)[np.linspace(0, len(v) - 1, min(200, len(v))).astype(int)]
        ax.plot(dots, i + 0.24 * np.sin(2.4 * np.arange(len(dots))), ".", ms=4, color=PALETTE[0], alpha=0.5)
        low, q1, median, q3, high = np.quantile(v, [0, 0.25, 0.5, 0.75, 1])
        ax.plot([low, high], [i, i], color="#1A1A1A", lw=0.9)
        ax.barh(i, q3 - q1, left=q1, height=0.5, facecolor="none", edgecolor="#1A1A1A", lw=1.0)
        ax.plot([median] * 2, [i - 0.25, i + 0.25], color=MEDIAN, lw=2)
