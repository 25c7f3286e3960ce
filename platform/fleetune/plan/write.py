"""Plans as files: Parquet tables, figures, and one HTML page that holds them all."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleetune.errors import UserError
from fleetune.plan import figures
from fleetune.plan.summary import by_stage, comparison
from fleetune.plan.walk import Plan, Row
from fleetune.progress import duration, size
from fleetune.reports.html import CSS

MAX_DRAWN = 8  # plans with figures of their own; the totals show the others


def write(plans: Sequence[Plan], out: Path) -> list[Path]:
    """``plan.parquet`` (per plan, round and device class), ``rounds.parquet``, ``figures/*.png`` and ``plan.html``."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be written to: {error.strerror}", field="--out", value=str(out)) from None
    tables = {
        "plan.parquet": [{"plan": plan.label, **row} for plan in plans for row in plan.devices],
        "rounds.parquet": [{"plan": plan.label, **row} for plan in plans for row in plan.rounds],
    }
    files = [_parquet(rows, out / name) for name, rows in tables.items()]
    pictures = [figures.totals(plans, out / "figures" / "totals.png")]
    for i, plan in enumerate(plans[:MAX_DRAWN]):
        pictures.append(figures.memory(plan, out / "figures" / f"memory_{i}.png"))
        if any(row["sim_seconds"] is not None for row in plan.devices):
            pictures.append(figures.turns(plan, out / "figures" / f"turns_{i}.png"))
    return [*files, _page(plans, pictures, out / "plan.html"), *pictures]


def _parquet(rows: Sequence[Row], path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def _page(plans: Sequence[Plan], pictures: Sequence[Path], path: Path) -> Path:
    title = f"Plan of {plans[0].spec.name}"
    images = "".join(
        f'<img alt="{picture.stem}" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    )
    assumed = "".join(
        f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(n for p in plans for n in p.assumptions)
    )
    body = [
        f"<h1>{html.escape(title)}</h1>",
        "<p class='sub'>No training, no weights: what the work would cost. Ratios: how many times as much the first plan "
        "needs.</p>",
        f"<h2>Assumed</h2><ul>{assumed}</ul>" if assumed else "",
        "<h2>Totals</h2>",
        _table(comparison(plans)),
        "<h2>Stages and devices</h2>",
        _table([row for plan in plans for row in by_stage(plan)]),
        "<h2>Figures</h2>",
        images,
    ]
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{CSS}</style>'
    )
    path.write_text(head + "\n".join(body) + "</html>\n", encoding="utf-8")
    return path


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    header = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    lines = "".join(
        "<tr>" + "".join(f"<td class='n'>{html.escape(_cell(name, row.get(name)))}</td>" for name in names) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{header}</tr>\n{lines}</table></div>'


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_seconds"):
        return duration(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
