"""Nested data as YAML gives it: copied and bounded, flattened to dotted fields, and overridden by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fleetune.errors import UserError

MAX_DEPTH = 50  # assumed: a job file has five levels
MAX_VALUES = 10_000  # assumed: a job file has a hundred; aliases of aliases double with every line
MAX_TEXT = 100_000  # assumed, in characters: a template of many pages
MAX_INTEGER = 2**63 - 1


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested data with dotted fields replaced. Another ``method.name`` starts from that method's defaults."""
    out = plain(values)
    overrides = {path: plain(value, path) for path, value in overrides.items()}
    name = overrides.get("method.name")
    if name is not None and isinstance(out.get("method"), dict) and out["method"].get("name") != name:
        out["method"] = {"name": name}
    for path, value in overrides.items():
        mapping = out
        *parents, last = path.split(".")
        for parent in parents:
            if not isinstance(mapping.get(parent), dict):
                mapping[parent] = {}
            mapping = mapping[parent]
        mapping[last] = value
    return out


def plain(value: Any, field: str = "", depth: int = 0, budget: Iterator[int] | None = None) -> Any:
    """A copy of a value from YAML in JSON's types, dates as text.

    Raises UserError for values that hold themselves or are too large, integers above 64 bits, and types that no field takes.
    ``budget`` counts the values of the whole copy: aliases of aliases are few in the file and double with every line.
    """
    budget = iter(range(MAX_VALUES)) if budget is None else budget
    if depth > MAX_DEPTH or next(budget, None) is None:
        rule = "is nested too deeply, or holds itself" if depth > MAX_DEPTH else f"holds more than {MAX_VALUES} values"
        raise UserError(rule, field=field.partition(".")[0] or "JOB")
    if isinstance(value, Mapping):
        named = {str(plain(key, field, depth + 1, budget)): part for key, part in value.items()}
        return {name: plain(part, f"{field}.{name}".lstrip("."), depth + 1, budget) for name, part in named.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, field, depth + 1, budget) for part in value]
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise UserError("is too large a number", field=field or "JOB", hint="integers have 64 bits")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise UserError(f"is longer than {MAX_TEXT} characters", field=field or "JOB", value=value)
    if isinstance(value, (bytes, set, frozenset)):
        raise UserError(f"is of YAML's type {type(value).__name__}, which no field takes", field=field or "JOB")
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
