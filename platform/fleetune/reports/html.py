"""The parts of a report's page: style, sections, tables, images. A page is one file that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from fleetune.reports.figures.style import STYLE

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1280px; margin: 2.5rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; }
p.sub { color: #666; margin: .2rem 0 1rem; }
img { max-width: 100%; display: block; margin: .5rem 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #ccc; padding: .3rem 1rem .3rem 0; }
td { border-bottom: 1px solid #eee; padding: .3rem 1rem .3rem 0; white-space: nowrap; }
td.n, th.n { text-align: right; }
td.best { font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt { color: #666; }
dd { margin: 0; }
code { font-size: .88em; }
"""


def page(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> str:
    """The whole document; ``style`` comes after that of all pages."""
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{text(title)}</title><style>{CSS}{style}</style>\n"
    return head + "\n".join(body) + (f"\n<script>{script}</script>" if script else "") + "\n</html>\n"


def section(title: str, content: str) -> str:
    """A heading and what is below it."""
    return f"<h2>{text(title)}</h2>\n{content}"


def table(header: Sequence[str], lines: Sequence[str], *, num_text_columns: int = 1) -> str:
    """Header and rows (each already cells) as a table that may scroll sideways."""
    kinds = ["" if i < num_text_columns else ' class="n"' for i in range(len(header))]
    head = "".join(f"<th{kind}>{text(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    rows = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>'


def image(path: Path, alt: str | None = None) -> str:
    """A PNG inside the page; ``alt`` says what it shows, by default its name."""
    content = path.read_bytes()
    inches = int.from_bytes(content[16:20], "big") / STYLE["savefig.dpi"]  # a PNG's width, from its first chunk
    data = base64.b64encode(content).decode()
    return f'<img alt="{text(alt or path.stem.replace("_", " "))}" width="{96 * inches:.0f}" src="data:image/png;base64,{data}">'


def percent(fraction: float | None) -> str:
    """A share of 1 in percent; a dash for none."""
    return "–" if fraction is None or fraction != fraction else f"{100 * fraction:.1f} %"


def text(value: object) -> str:
    """A value as text in HTML."""
    return html.escape(str(value))
