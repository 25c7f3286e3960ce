"""A report's page as a value: sections of notes, tables and images. One template gives all pages one look.

A page is one file that needs nothing from elsewhere: style, script and images are inside it.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fleetune.files import write as write_file
from fleetune.reports.figures.style import STYLE
from fleetune.units import NOTHING

if TYPE_CHECKING:
    import jinja2

CSS_PIXELS_PER_INCH = 96


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, the value it is sorted by (the text if None), and if it is the best of its column."""

    text: str
    value: Any = None
    best: bool = False
    links: tuple[tuple[str, str], ...] = ()
    """(text, address) of what stands in the cell instead of its text."""

    @property
    def is_number(self) -> bool:
        """True if it is sorted as a number."""
        value = self.value
        return (
            not isinstance(value, str | bool) and value is not None and hasattr(value, "__float__") and value == value
        )

    @property
    def sort_key(self) -> str:
        """A number that is not known has an empty key, which is sorted to the end in both directions."""
        if self.text == NOTHING:
            return ""
        return f"{float(self.value):.9g}" if self.is_number else self.text


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; sorts when the head of a column is clicked, or chosen with the keyboard."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    """Read aloud by screen readers, not shown."""

    @property
    def heads(self) -> list[str]:
        """The header, in which a number stays on one line with its unit and its relation."""
        return [re.sub("(?<=[0-9≤]) ", "\u00a0", name) for name in self.header]

    def is_numeric(self, column: int) -> bool:
        """True if a column holds numbers, which are set to the right."""
        return any(row[column].is_number for row in self.rows)


@dataclass(frozen=True)
class Note:
    """A paragraph: plain text, or Markup where it holds code or emphasis."""

    kind: ClassVar[str] = "note"
    text: str
    style: str = ""
    """``answer``: what the page comes to. ``heading``: the name of what follows."""


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    kind: ClassVar[str] = "items"
    lines: Sequence[str]


@dataclass(frozen=True)
class Image:
    """A PNG inside the page, in its size on paper."""

    kind: ClassVar[str] = "image"
    path: Path
    alt: str

    @functools.cached_property
    def content(self) -> bytes:
        """The file's bytes."""
        return self.path.read_bytes()

    @property
    def width(self) -> int:
        """CSS pixels; a PNG's first chunk holds its own."""
        return round(int.from_bytes(self.content[16:20], "big") / STYLE["savefig.dpi"] * CSS_PIXELS_PER_INCH)

    @property
    def address(self) -> str:
        """The image itself, as a data address."""
        return "data:image/png;base64," + base64.b64encode(self.content).decode()


Part = Table | Note | Items | Image


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()
    """(name, value) pairs on top."""
    lead: Sequence[Part] = ()
    """The parts before the first section."""

    def write(self, path: Path) -> Path:
        """Writes the page to a file."""
        text = _environment().get_template("page.html").render(page=self)
        write_file(path, text.encode())
        return path


def image(path: Path, alt: str | None = None) -> Image:
    """An image; ``alt`` says what it shows, by default the file's name."""
    return Image(path, alt or path.stem.replace("_", " "))


def markup(sentence: str, *values: object) -> str:
    """A sentence with code or emphasis in it; the values that it is filled with are escaped."""
    from markupsafe import Markup

    return Markup(sentence).format(*values) if values else Markup(sentence)


@functools.cache
def _environment() -> jinja2.Environment:
    """Templates that escape every value of a page, but for Markup."""
    import jinja2

    loader = jinja2.PackageLoader("fleetune.reports", "templates")
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
