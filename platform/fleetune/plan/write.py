"""Plans as files: Parquet tables, figures, and one HTML page that holds them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleetune.errors import UserError
from fleetune.plan import figures
from fleetune.plan.summary import by_stage, comparison
from fleetune.plan.walk import Plan, Row
from fleetune.reports.html import Cell, Items, Page, Section, Table, image
from fleetune.units import NOTHING, readable

MAX_DRAWN = 8  # plans with figures of their own; the totals show the others


def write(plans: Sequence[Plan], out: Path) -> list[Path]:
    """``plan.parquet`` (per plan, round and device class), ``rounds.parquet``, ``figures/*.png`` and ``plan.html``.

    Returns their paths. Raises UserError if the folder cannot be made.
    """
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
    """One HTML page with all tables and figures."""
    assumed = list(dict.fromkeys(note for plan in plans for note in plan.assumptions))
    stages = [row for plan in plans for row in by_stage(plan)]
    totals = comparison(plans)
    if len(plans) == 1:  # nothing to compare with
        totals = [{name: value for name, value in row.items() if not name.endswith("_ratio")} for row in totals]
    sections = [
        *([Section("Assumed", [Items(assumed)])] if assumed else []),
        Section("Totals", [_table(totals, "Totals")]),
        Section("Stages and devices", [_table(stages, "Stages and devices")]),
        Section("Figures", [image(picture) for picture in pictures]),
    ]
    subtitle = "No training, no weights: what the work would cost."
    subtitle += " Ratios: how many times as much the first plan needs." if len(plans) > 1 else ""
    return Page(f"Plan of {plans[0].spec.name}", subtitle, sections).write(path)


def _table(rows: Sequence[Row], caption: str) -> Table:
    """A table with a column for each name in the rows; the last word of a name is its unit."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[Cell(_text(name, row.get(name)), row.get(name)) for name in names] for row in rows]
    return Table([name.removeprefix("num_").replace("_", " ") for name in names], cells, caption=caption)


def _text(name: str, value: Any) -> str:
    for quantity in ("bytes", "seconds", "joules", "flops"):
        if name == quantity or name.endswith(f"_{quantity}"):
            return readable(value, quantity)
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
