"""Figures of what swept fields do: score against one field, heat map of two, parallel coordinates of all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fleetune.reports.figures.style import PALETTE, largest, panels, percent, plain_log
from fleetune.reports.figures.sweep import MARKERS
from fleetune.reports.sweep_results import COSTS, METHOD, SweepResults, amount, value_text
from fleetune.reports.sweep_stats import effect, heat_map
from fleetune.units import scale_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Ordered in lightness, and the same to the colour-blind: https://doi.org/10.1371/journal.pone.0199239
COLORS = "cividis"
MAX_FIELDS = 6
MAX_NAMES = 16  # that have room above each other on an axis


def effects(results: SweepResults, *, path: Path) -> Path | None:
    """Score against each swept field: a line per method, mean over all else, its standard deviation as a bar. Values
    that a search has drawn, each but once, are dots.

    None where only the method was swept, or nothing.
    """
    fields = [field for field in results.fields if field != METHOD][:MAX_FIELDS]
    if not fields:
        return None
    score, columns = results.score, min(3, len(fields))
    by = results.trials["method"].fillna("–")
    methods = list(dict.fromkeys(by[results.trials[score.column].notna()]))
    with panels(path, columns=columns, rows=-(-len(fields) // columns), width=5.2 if columns == 1 else 4.4) as axes:
        for ax, field in zip(axes, fields, strict=False):
            table = effect(results.trials, score, field, by)
            values = _Places(table["value"])
            for i, method in enumerate(methods):
                line = table[table["by"] == method]
                x = values.place(line["value"]) + (0.06 * (i - (len(methods) - 1) / 2) if not values.numeric else 0.0)
                look: Any = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "ms": 5}
                drawn = len(line) > len(PALETTE) and (line["num_trials"] == 1).all()  # by a search: no two alike
                look |= {"ls": "" if drawn else "-" if values.numeric else ":", "label": method}
                look |= {"capsize": 3, "elinewidth": 1}
                ax.errorbar(x, line["mean"], yerr=line["spread"], **look)
            values.label(ax)
            ax.set(title=f"{score.title.capitalize()} against {field.rpartition('.')[2]}", xlabel=field)
            if score.is_fraction:
                percent(ax)
        for ax in axes[len(fields) :]:
            ax.set_axis_off()
        if len(methods) > 1:
            handles, labels = axes[0].get_legend_handles_labels()
            figure: Any = axes[0].figure
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return path


def heat(results: SweepResults, *, path: Path) -> Path | None:
    """Mean score at each pair of values, where exactly two fields were swept, and half the pairs tried; else None."""
    if len(results.fields) != 2:
        return None
    table = heat_map(results.trials, results.score, *results.fields)
    if 2 * int(table.notna().to_numpy().sum()) < table.size:
        return None
    num_rows, num_columns = table.shape
    size: Any = {"width": 2.6 + 0.85 * max(3, num_columns), "height": 1.4 + 0.5 * max(2, num_rows)}
    with panels(path, columns=1, **size) as (ax,):
        image = ax.imshow(table.to_numpy(dtype=float), cmap=COLORS, aspect="auto")
        ax.set_xticks(range(num_columns), [value_text(v) for v in table.columns])
        ax.set_yticks(range(num_rows), [value_text(v) for v in table.index])
        ax.set(xlabel=results.fields[1], ylabel=results.fields[0], title=f"Mean {results.score.title}")
        ax.grid(visible=False)
        if table.size <= 150:
            middle = float(np.mean(image.get_clim()))
            for (row, column), value in np.ndenumerate(table.to_numpy(dtype=float)):
                color = "black" if value > middle else "white"
                text = amount(float(value), results.score) if np.isfinite(value) else "–"
                ax.text(
                    column, row, text, ha="center", va="center", fontsize=9, color=color if text != "–" else "black"
                )
    return path


def parallel(results: SweepResults, *, path: Path) -> Path | None:
    """A line per configuration through its fields, score and costs, coloured by score; None for fewer than two fields."""
    if len(results.fields) < 2:
        return None
    score = results.score
    first = results.trials.drop_duplicates("configuration").set_index("configuration").reindex(results.ranking.index)
    fields = results.fields[:MAX_FIELDS]
    axes_of: list[tuple[str, _Places]] = [(field, _Places(first[field])) for field in fields]
    for cost in COSTS[:2]:
        divisor, unit = scale_of(largest(results.ranking[cost.column]), cost.quantity)
        axes_of.append((f"{cost.title}\n({unit})", _Places(results.ranking[cost.column] / divisor)))
    axes_of.append((score.title, _Places(results.ranking["score"])))
    heights = np.column_stack([values.heights() for _, values in axes_of])  # [configurations, axes], 0 to 1
    order = score.sign() * results.ranking["score"].to_numpy(dtype=float)
    with panels(path, columns=1, width=max(7.0, 1.9 * len(axes_of)), height=4.4) as (ax,):
        import matplotlib
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        # The lightest shades are hard to see on white, so the scale ends before them.
        shades = ListedColormap(matplotlib.colormaps[COLORS](np.linspace(0.95, 0.0, 256)))
        scale = ScalarMappable(Normalize(float(order.min()), float(order.max())), shades)
        for i in reversed(range(len(order))):
            line: Any = {"color": scale.to_rgba(order[i]), "lw": 2.4 if i == 0 else 1.4, "alpha": 0.9}
            ax.plot(range(len(axes_of)), heights[i], **line)
        for at, (_, values) in enumerate(axes_of):
            ax.axvline(at, color="#555555", lw=1)
            for height, text in values.ticks(score if at == len(axes_of) - 1 else None):
                box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
                ax.text(at + 0.03, height, text, fontsize=8, va="center", bbox=box)
        ax.set_xticks(range(len(axes_of)), [name.replace(".", ".\n", 1) for name, _ in axes_of])
        ax.set(xlim=(-0.1, len(axes_of) - 0.6), ylim=(-0.05, 1.05), title="Every configuration; the darker, the better")
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.tick_params(axis="x", length=0)
    return path


class _Places:
    """Where the values of a field lie on an axis: numbers at their value (or its logarithm), names side by side."""

    def __init__(self, values: pd.Series):
        self.values = values
        self.numeric = not isinstance(values.dtype, pd.CategoricalDtype) and pd.api.types.is_numeric_dtype(values)
        present = values.dropna()
        self.ordered: list[Any] = sorted(set(present)) if self.numeric else list(present.cat.categories)
        self.is_log = bool(
            self.numeric and self.ordered and self.ordered[0] > 0 and self.ordered[-1] / self.ordered[0] >= 8
        )

    def place(self, values: pd.Series) -> np.ndarray:
        """Values on the axis, before it becomes logarithmic."""
        if self.numeric:
            return values.to_numpy(dtype=float)
        return np.array([self.ordered.index(v) if v in self.ordered else np.nan for v in values], dtype=float)

    def label(self, ax: Axes) -> None:
        """Ticks of a horizontal axis: at every value, unless their texts would run into each other."""
        if self.is_log:
            plain_log(ax)
        texts = [value_text(v) for v in self.ordered]
        room = 0.03 + 0.02 * max(map(len, texts))  # width of a text, as a share of the axis
        crowded = len(texts) > 1 and np.diff(self.heights(self.ordered)).min() < room
        if not crowded or (not self.numeric and len(texts) <= 12):
            at = self.ordered if self.numeric else range(len(texts))
            ax.set_xticks(at, texts, rotation=20 if crowded else 0)
            ax.minorticks_off()
        if not self.numeric:
            ax.set_xlim(-0.5, len(texts) - 0.5)

    def heights(self, values: Any = None) -> np.ndarray:
        """Places between 0 and 1; what is missing lies at -0.03."""
        at = self.place(self.values if values is None else pd.Series(values))
        ends = self.place(pd.Series(self.ordered))
        at, ends = (np.log(at), np.log(ends)) if self.is_log else (at, ends)
        span = float(ends[-1] - ends[0]) if len(ends) else 0.0
        return np.nan_to_num((at - ends[0]) / span if span else np.where(np.isfinite(at), 0.5, np.nan), nan=-0.03)

    def ticks(self, score: Any) -> list[tuple[float, str]]:
        """(height, text) of each value. Of many numbers: five in equal steps; of many names: those that there is room for."""
        values = self.ordered
        if self.numeric and len(values) > 8:
            low, high = values[0], values[-1]
            steps = np.geomspace(low, high, 5) if self.is_log else np.linspace(low, high, 5)
            values = [float(f"{step:.3g}") for step in steps]
        elif len(values) > MAX_NAMES:
            values = values[:: -(-len(values) // MAX_NAMES)]
        texts = [amount(v, score) if score else f"{v:.3g}" if self.numeric else value_text(v) for v in values]
        return list(zip(self.heights(values).tolist(), texts, strict=True))
