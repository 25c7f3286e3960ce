"""Text: a prompt from a record's columns, and the answer in a response."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from fleetune.errors import UserError, nearest


def column_names(template: str) -> list[str]:
    """The columns that a template names, in order. Raises ValueError if its braces do not parse."""
    return [name for _, name in _parts(template) if name is not None]


def begins_with_a_column(template: str) -> bool:
    """True if nothing but blanks stands before the template's first column."""
    literal, name = _parts(template.lstrip())[0]
    return name is not None and not literal


def render_prompts(template: str, columns: Mapping[str, Sequence[str]]) -> list[str]:
    """The prompts of all records. ``columns``: text per column and record, all columns of one length."""
    parts = _parts(template)
    for _, name in parts:
        if name is not None and name not in columns:
            guess = nearest(name, columns)
            hint = (f"did you mean {guess!r}? " if guess else "") + f"columns: {', '.join(columns)}"
            raise UserError("no such column", field="data.template", value=name, hint=hint)
    num_records = len(next(iter(columns.values())))
    pieces = [columns[name] if name is not None else [literal] * num_records for literal, name in parts]
    return ["".join(piece) for piece in zip(*pieces, strict=True)]


def _parts(template: str) -> list[tuple[str, str | None]]:
    """The template cut into (literal text, None) and ("", column). Only plain ``{column}`` is allowed."""
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        if literal:
            parts.append((literal, None))
        if name is None:
            continue
        if not name or spec or conversion:
            raise ValueError("write a column in braces, {prompt}, without a format; {{ is a brace")
        parts.append(("", name))
    return parts


def extract_answer(text: str, pattern: str) -> str | None:
    """The first match of ``pattern`` (its first group, if it has one) without commas and $, or None."""
    match = re.search(pattern, text)
    if match is None:
        return None
    return _plain(match[1] if match.re.groups and match[1] is not None else match[0])


def exact_match(predictions: Sequence[str], references: Sequence[str], *, pattern: str) -> np.ndarray:
    """True for each prediction that gives its reference's answer, bool ``(n,)``; numbers are compared as numbers.

    A text in which ``pattern`` finds nothing is compared in full, so that bare answers and labels work too.
    """
    pairs = zip(predictions, references, strict=True)
    return np.array([_answer(ours, pattern) == _answer(theirs, pattern) for ours, theirs in pairs], dtype=bool)


def _answer(text: str, pattern: str) -> str | Decimal:
    found = extract_answer(text, pattern)
    answer = _plain(text) if found is None else found
    try:
        number = Decimal(answer)
    except InvalidOperation:
        return answer
    return number if number.is_finite() else answer


def _plain(text: str) -> str:
    return text.replace(",", "").replace("$", "").strip()
