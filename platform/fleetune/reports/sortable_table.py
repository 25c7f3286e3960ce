"""Tables that sort when the head of a column is clicked, or chosen with the keyboard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fleetune.reports.html import text

# One listener for all tables of the page. What cannot be compared (a dash) stays at the end, in both directions.
SCRIPT = """
document.addEventListener("click", event => {
  const button = event.target.closest("th button");
  if (!button) return;
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  const column = head.cellIndex, value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
    return down ? -order : order;
  }));
});
"""
STYLE = """
p.answer { font-size: 1.05rem; background: #eef5fb; border-left: 4px solid #0072B2; padding: .6rem .9rem; }
div.scroll { overflow: auto; max-height: 30rem; margin: .6rem 0; border-bottom: 1px solid #ddd; }
div.scroll table { border-collapse: separate; border-spacing: 0; min-width: 100%; }
div.scroll th { position: sticky; top: 0; background: #fff; vertical-align: bottom; padding-right: .9rem; }
div.scroll td { padding-right: .9rem; }
div.scroll td:not(:first-child), div.scroll th:not(:first-child) { padding-left: .4rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
p code { white-space: nowrap; }
caption { position: absolute; left: -9999px; }
td.best { background: #eef5fb; }
"""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, the value it is sorted by (its text where it has none), and whether it is the best."""

    text: str
    value: Any = None
    best: bool = False
    link: str | None = None


def sortable(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str) -> str:
    """A table that scrolls inside the page; columns of numbers are set to the right."""
    kinds = ["n" if any(_is_number(row[i].value) for row in rows) else "" for i in range(len(header))]
    heads = [
        f'<th scope="col" class="{k}"><button>{_tied(h)}</button></th>' for k, h in zip(kinds, header, strict=True)
    ]
    lines = ["".join(_td(cell, kind) for cell, kind in zip(row, kinds, strict=True)) for row in rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{text(caption)}</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _td(cell: Cell, kind: str) -> str:
    """A number that is not known has an empty value: it is sorted to the end."""
    shown = text(cell.text)
    if cell.link:
        shown = f'<a href="{text(cell.link)}">{shown}</a>'
    names = " ".join(name for name in (kind, "best" if cell.best else "") if name)
    if cell.text == "–":
        key = ""
    else:
        key = f"{float(cell.value):.9g}" if _is_number(cell.value) else cell.text
    return f'<td class="{names}" data-v="{text(key)}">{shown}</td>'


def _tied(name: str) -> str:
    """A column's head; a number stays on one line with its unit and its relation."""
    return re.sub("(?<=[0-9≤]) ", "\u00a0", text(name))


def _is_number(value: Any) -> bool:
    return not isinstance(value, str | bool) and value is not None and hasattr(value, "__float__") and value == value
