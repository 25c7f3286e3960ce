"""A run's timeline as a picture: who did what when, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune.records.run_directory import RunDirectory
from fleetune.records.timeline import PHASES, round_starts
from fleetune.reports.figures.style import PHASE_COLORS, REFUSED, largest, panels
from fleetune.units import scale_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MAX_CLIENTS = 36


def timeline(run: RunDirectory, *, path: Path, rounds: Sequence[int] | None = None) -> Path:
    """Who did what when, in virtual time: the given rounds, by default the last three. Refused clients have a cross."""
    frame, clients = run.rounds(), run.clients()
    starts = round_starts(frame)
    chosen = list(rounds) if rounds is not None else frame["round"].tolist()[-3:]
    clients = clients[clients["round"].isin(chosen)].assign(device=lambda c: c["device"].fillna("-"))
    order = clients[["device", "client_id"]].drop_duplicates().sort_values(["device", "client_id"])
    if len(order) > MAX_CLIENTS:
        order = order.iloc[np.linspace(0, len(order) - 1, MAX_CLIENTS).astype(int)]
    place = {client_id: i for i, client_id in enumerate(order["client_id"])}
    clients = clients[clients["client_id"].isin(place)]
    y = clients["client_id"].map(place).to_numpy(dtype=float)
    start = clients["round"].map(starts).to_numpy(dtype=float)
    end = largest(frame.loc[frame["round"].isin(chosen), "sim_seconds"])
    divisor, unit = scale_of(end, "seconds")
    with panels(path, columns=1, width=11, height=1.4 + 0.2 * max(5, len(order))) as (ax,):
        span = (
            f"rounds {chosen[0]}–{chosen[-1]}" if len(chosen) > 1 else f"round {chosen[0]}" if chosen else "no rounds"
        )
        ax.set(title=f"Timeline, {span}", xlabel=f"virtual time ({unit})")
        ax.grid(axis="y", visible=False)
        refused = clients["status"].isin(("oom", "refused")).to_numpy()
        at = start
        for phase in PHASES:
            seconds = np.nan_to_num(clients[f"{phase}_seconds"].to_numpy(dtype=float))
            ran = ~refused & (seconds > 0)
            if ran.any():
                look: Any = {
                    "color": PHASE_COLORS[phase],
                    "label": phase,
                    "edgecolor": "white",
                    "linewidth": 0.4,
                }
                ax.barh(y[ran], seconds[ran] / divisor, left=at[ran] / divisor, **look)
            at = at + seconds
        if refused.any():
            ax.plot(
                (start / divisor)[refused],
                y[refused],
                "x",
                color=REFUSED,
                ms=5,
                mew=1.6,
                label="refused",
            )
        for round_idx in chosen:
            ax.axvline(starts[round_idx] / divisor, color="#999999", lw=0.8, ls=":")
        ax.axvline(end / divisor, color="#999999", lw=0.8, ls=":")
        _device_ticks(ax, order)
        ax.set_ylim(len(order) - 0.4, -0.6)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.5 / max(5, len(order))), ncols=4)
    return path


def _device_ticks(ax: Axes, order: pd.DataFrame) -> None:
    """A device class's name in the middle of its clients, a line between classes."""
    middles, names, first = [], [], 0
    for device, members in order.groupby("device", sort=True):
        middles.append(first + (len(members) - 1) / 2)
        names.append(f"{device}\n{len(members)} clients")
        first += len(members)
        ax.axhline(first - 0.5, color="#DDDDDD", lw=0.8)
    ax.set_yticks(middles, names)
