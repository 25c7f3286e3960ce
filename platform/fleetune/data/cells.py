"""Turns cells into text, with one rule for every type that JSON, CSV, Parquet and the hub can hold."""

from __future__ import annotations

import json
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any


def text_of(value: Any) -> str:
    """A cell as text. Null and NaN are no text; a list of texts has one item a line, other structures are JSON.

    Numbers and truth values are written as JSON does (``3``, ``3.0``, ``true``), dates as ISO 8601, bytes must be UTF-8.
    Raises ValueError with the reason for values that have no text: other bytes, images.
    """
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return str(value)
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, list) and all(isinstance(item, str | bytes) for item in value):
        return "\n".join(map(text_of, value))
    if isinstance(value, list | tuple | dict):
        return json.dumps(_plain(value), ensure_ascii=False)
    raise ValueError(f"a value of type {type(value).__name__} is no text")


def is_missing(value: Any) -> bool:
    """True if a cell is null, or NaN, which stands for null in numeric columns; the text "nan" is text."""
    return value is None or (not isinstance(value, str | bytes | list | tuple | dict) and bool(value != value))


def is_structure(value: Any) -> bool:
    """True if a cell is a list or an object: no rule can tell which text in it is meant."""
    return isinstance(value, list | tuple | dict)


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, dict):
        return {text_of(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_missing(value):
        return None
    return value if isinstance(value, str | bool | int | float) else text_of(value)


def _decoded(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"its bytes are not UTF-8 (byte 0x{value[error.start]:02x})") from None
