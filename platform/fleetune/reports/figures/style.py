"""What all figures share: palette, style, a row of panels, axes in percent, legends below."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart also by the colour-blind: https://jfly.uni-koeln.de/color/
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5AA8", "#4D4D4D")
PHASE_COLORS = {"downlink": "#56B4E9", "compute": "#0072B2", "server": "#7F5AA8", "uplink": "#E69F00"}
REFUSED, BUDGET = "#D55E00", "#1A1A1A"
# For what is in a figure without being its subject.
GREY = "#C4C4C4"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 130,
}


@contextlib.contextmanager
def panels(path: Path, *, columns: int, rows: int = 1, width: float = 4.4, height: float = 3.4) -> Iterator[list[Axes]]:
    """A row (or rows) of panels, saved to ``path`` at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False).flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", bbox_inches="tight")


def percent(ax: Axes) -> None:
    """The vertical axis in percent of 1."""
    from matplotlib.ticker import PercentFormatter

    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def plain_log(ax: Axes) -> None:
    """A logarithmic horizontal axis with few ticks, written 0.002 and 50."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    least, most = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if most < 100 * least else (1.0, 3.0), numticks=12))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def legend(figure: Any, ax: Axes, groups: dict[str, Any]) -> None:
    """The legend of one panel below all of them, if there is more than one group."""
    handles, labels = ax.get_legend_handles_labels()
    if len(groups) > 1 and handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))


def largest(values: Any) -> float:
    """The largest finite value; 0 if there is none."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    return float(finite.max()) if len(finite) else 0.0
