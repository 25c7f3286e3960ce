"""Parses the JSON of data files, whose values become text, and says why a value cannot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100  # levels of lists and objects (assumed); json itself ends somewhere near a thousand
MAX_DIGITS = 4_300  # of an integer: the most that Python turns into text

_BLANKS = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonFault(ValueError):
    """The reason why a JSON text cannot be used; ``at`` is the index of the character at fault, None if unknown."""

    def __init__(self, reason: str, at: int | None = None):
        self.at = at
        super().__init__(reason)


def parse(text: str) -> Any:
    """The value of a JSON text. Raises JsonFault."""
    value, end = _value(text, _skip_blanks(text, 0))
    rest = _skip_blanks(text, end)
    if rest < len(text):
        raise JsonFault("Extra data", rest)
    return value


def items(text: str) -> Iterator[tuple[int, Any]]:
    """The items of a text that is one JSON list, each with the character where it begins. Raises JsonFault."""
    at = _skip_blanks(text, _skip_blanks(text, 0) + 1)
    more = text[at : at + 1] != "]"
    while more:
        value, end = _value(text, at)
        yield at, value
        at = _skip_blanks(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _skip_blanks(text, at + 1)
        elif text[at : at + 1] != "]":
            raise JsonFault("Expecting ',' delimiter", at)
    rest = _skip_blanks(text, at + 1)
    if rest < len(text):
        raise JsonFault("Extra data", rest)


def _value(text: str, start: int) -> tuple[Any, int]:
    """One value, checked, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise JsonFault(error.msg, error.pos) from None
    except RecursionError:
        raise JsonFault(f"nested more than {MAX_DEPTH} levels deep", start) from None
    except JsonFault as error:
        raise JsonFault(str(error), start) from None
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _is_deep(value):
        raise JsonFault(f"nested more than {MAX_DEPTH} levels deep", start)
    if _SURROGATE.search(text, start, end):
        _check_characters(value, start)
    return value, end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise JsonFault(f"an object has the name {twice!r} twice")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise JsonFault(f"a number of {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), -float("inf")):
        raise JsonFault("a number beyond 1.8e308")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, list | dict)]
        if not level:
            return False
    return True


def _check_characters(value: Any, start: int) -> None:
    """Refuse half of a surrogate pair: JSON can write it (``\\ud83d``), but it is no character of any text."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise JsonFault(f"\\u{half:04x} is half of a surrogate pair, no character", start) from None


def _skip_blanks(text: str, start: int) -> int:
    match = _BLANKS.match(text, start)
    return match.end() if match else start


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)
