"""The groups of a progressive method's blocks, as PNG: how similar blocks are, which are grouped, how far each group moved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune.records.run_directory import RunDirectory
from fleetune.reports.figures.style import PALETTE, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_STAGES = 6


def block_groups(run: RunDirectory, *, path: Path) -> Path | None:
    """A column per stage, the last ones if there are many: similarities above, changes below. None if no groups are on record."""
    stages = {stage: kept for stage, kept in run.stages().items() if "groups" in kept and "similarity" in kept}
    if not stages:
        return None
    shown = list(stages.items())[-MAX_STAGES:]
    with panels(path, columns=len(shown), rows=2, width=3.6) as axes:
        for i, (stage, kept) in enumerate(shown):
            _similarity(axes[i], stage, kept)
            _moved(axes[len(shown) + i], kept)
    return path


def _similarity(ax: Axes, stage: int, kept: dict[str, Any]) -> None:
    """The matrix (L, L) in shades, with a dot at every pair of blocks of one group, in the group's colour."""
    similarity = np.array(kept["similarity"], dtype=float)
    others = similarity[~np.eye(len(similarity), dtype=bool)]  # the diagonal is 1 and would leave no shades to the rest
    least, most = (float(others.min()), float(others.max())) if len(others) else (0.0, 1.0)
    shades = ax.imshow(similarity, cmap="Greys", vmin=least, vmax=most, origin="lower")
    ax.figure.colorbar(shades, ax=ax, shrink=0.8)
    for n, group in enumerate(kept["groups"]):
        pairs = np.array([(a, b) for a in group for b in group])
        ax.scatter(pairs[:, 0], pairs[:, 1], s=90 / len(similarity), color=PALETTE[n % len(PALETTE)])
    ax.grid(visible=False)
    ax.set(title=f"Stage {stage}: {len(kept['groups'])} groups", xlabel="block", ylabel="block")


def _moved(ax: Axes, kept: dict[str, Any]) -> None:
    """At every block, how far the adapter of its group moved during the stage."""
    moved = kept.get("moved") or [0.0] * len(kept["groups"])
    for n, (group, distance) in enumerate(zip(kept["groups"], moved, strict=True)):
        ax.bar(group, [distance] * len(group), color=PALETTE[n % len(PALETTE)])
    ax.set(title="Change of the group's adapter", xlabel="block", ylabel="norm")
