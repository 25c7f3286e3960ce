"""The figure of clients' own models: how well each does, against what its client has paid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.reports.figures.style import PALETTE, largest, legend, panels, percent
from fleetune.units import scale_of

if TYPE_CHECKING:
    import pandas as pd

PAID = (("energy_joules", "Energy since the start"), ("link_bytes", "Bytes since the start, both ways"))


def quality_against_cost(clients: pd.DataFrame, *, path: Path) -> Path:
    """A dot per client, coloured by device class: its accuracy, or else its loss, against energy and against bytes.

    ``clients``: rows of `client_stats.own_models`.
    """
    has_accuracy = clients["eval_accuracy"].notna().any()
    column, title = ("eval_accuracy", "Accuracy") if has_accuracy else ("eval_loss", "Loss")
    devices = {str(device): rows for device, rows in clients.groupby("device")}
    with panels(path, columns=2, width=5.2, height=3.8) as axes:
        for ax, (cost, label) in zip(axes, PAID, strict=True):
            divisor, unit = scale_of(largest(clients[cost]), cost.rpartition("_")[2])
            for i, (device, rows) in enumerate(devices.items()):
                color = PALETTE[i % len(PALETTE)]
                ax.plot(rows[cost] / divisor, rows[column], "o", ms=5, alpha=0.8, color=color, label=device)
            ax.axhline(clients[column].mean(), color="#777777", lw=0.9, ls="--")
            ax.set(title=f"{title} of each client's own model", xlabel=f"{label} ({unit})")
            ax.set_xlim(left=0)
            if has_accuracy:
                percent(ax)
        legend(axes[0].figure, axes[0], devices)
    return path
