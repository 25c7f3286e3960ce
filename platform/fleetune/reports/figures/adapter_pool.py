"""A pool of adapters in use, as PNG: ranks computed in each matrix, how much each adapter's ranks matter, and mean gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune.records.run_directory import RunDirectory
from fleetune.reports.figures.style import PALETTE, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def adapter_pool(run: RunDirectory, *, path: Path) -> Path | None:
    """The state after the last stage: a panel for each kind of record. None if the run's method keeps no pool."""
    kept = next((kept for _, kept in sorted(run.stages().items(), reverse=True) if "quotas" in kept), None)
    if kept is None:
        return None
    shares = [(name, title) for name, title in (("importance", "Importance"), ("fusion", "Fusion")) if name in kept]
    with panels(path, columns=1 + 2 * len(shares), width=4.0) as axes:
        _shades(axes[0], kept["quotas"], "Ranks computed for a token")
        for i, (name, title) in enumerate(shares):
            _by_adapter(axes[1 + 2 * i], kept, kept[name], title)
            site, values = max(kept[name].items(), key=lambda item: sum(item[1]))
            _by_expert(axes[2 + 2 * i], kept, site, values, title)
    return path


def _shades(ax: Axes, values: dict[str, float], title: str) -> None:
    """A value of each matrix in shades, blocks to the right, the kinds of matrices upwards."""
    kinds = list(dict.fromkeys(_parts(site)[1] for site in values))
    blocks = sorted({_parts(site)[0] for site in values})
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for site, value in values.items():
        block, kind = _parts(site)
        grid[kinds.index(kind), blocks.index(block)] = value
    shades = ax.imshow(grid, cmap="Greys", vmin=0.0, aspect="auto", origin="lower")
    ax.figure.colorbar(shades, ax=ax, shrink=0.8)
    ax.grid(visible=False)
    ax.set(title=title, xlabel="block", yticks=range(len(kinds)), yticklabels=kinds)


def _by_adapter(ax: Axes, kept: dict[str, Any], values: dict[str, list[float]], title: str) -> None:
    """Over the blocks, what each adapter has of a quantity: the sum over its experts, the mean over the block's matrices."""
    blocks = sorted({_parts(site)[0] for site in values})
    for n, name in enumerate(kept["adapters"]):
        means = [
            np.mean([_sums(kept, site, own)[n] for site, own in values.items() if _parts(site)[0] == block])
            for block in blocks
        ]
        ax.plot(blocks, means, marker="o", label=name, color=PALETTE[n % len(PALETTE)])
    ax.set(title=f"{title} by adapter", xlabel="block")
    ax.legend()


def _by_expert(ax: Axes, kept: dict[str, Any], site: str, values: list[float], title: str) -> None:
    """Every expert of one matrix, in the colour of its adapter."""
    owners = _owners(kept, site, len(values))
    ax.bar(range(len(values)), values, color=[PALETTE[n % len(PALETTE)] for n in owners])
    ax.set(title=f"{title}: {'.'.join(map(str, _parts(site)))}", xlabel="expert")


def _sums(kept: dict[str, Any], site: str, values: list[float]) -> np.ndarray:
    """(N,): the sum over each adapter's experts."""
    return np.bincount(_owners(kept, site, len(values)), values, len(kept["adapters"]))


def _owners(kept: dict[str, Any], site: str, num_experts: int) -> np.ndarray:
    """The adapter of each expert: experts are whole adapters or their ranks."""
    ranks = kept["ranks"][site]
    return np.arange(len(ranks)) if num_experts == len(ranks) else np.repeat(np.arange(len(ranks)), ranks)


def _parts(site: str) -> tuple[int, str]:
    """``layers.3.self_attn.q_proj`` -> 3 and ``q_proj``."""
    _, block, *_, kind = site.split(".")
    return int(block), kind
