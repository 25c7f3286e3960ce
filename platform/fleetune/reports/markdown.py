"""Notes and tables of a report as Markdown, for documentation and for issues."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from fleetune.reports.html import Cell, Note, Part, Table


def markdown(parts: Sequence[Part]) -> str:
    """The notes and tables among a report's parts, with a blank line between them; the best cells of a table are bold."""
    texts = [
        _paragraph(part) if isinstance(part, Note) else _table(part) for part in parts if isinstance(part, Note | Table)
    ]
    return "\n\n".join(texts)


def _paragraph(note: Note) -> str:
    """A note's text; of the elements that `markup` takes, these two have a form in Markdown."""
    text = re.sub("</?b>", "**", note.text)
    text = re.sub("</?code>", "`", text)
    return html.unescape(str(text))


def _table(table: Table) -> str:
    aligned = ["---:" if table.is_numeric(i) else "---" for i in range(len(table.header))]
    lines = [list(map(_escaped, table.header)), aligned, *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    return f"**{_escaped(cell.text)}**" if cell.best else _escaped(cell.text)


def _escaped(text: str) -> str:
    """A text that stays in its cell."""
    return " ".join(text.split()).replace("|", r"\|")
