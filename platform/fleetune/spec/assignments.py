"""Overrides from the command line: ``field=value`` as text, each value as its field takes it."""

from __future__ import annotations

import contextlib
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from fleetune.errors import UserError
from fleetune.methods.find import find_method, known_methods
from fleetune.spec.run_spec import RunSpec
from fleetune.yaml_text import NOT_YAML, DuplicateKey
from fleetune.yaml_text import load as load_yaml


def parse_overrides(assignments: list[str], *, method: str | None = None) -> dict[str, Any]:
    """``["method.growth_rate=4"]`` -> ``{"method.growth_rate": 4}``; each value as its field takes it (`value_of`).

    ``method``: the job's method, if it is known. One from outside has settings that are not known before it is imported.
    """
    named = [text for field, text in map(split_assignment, assignments) if field == "method.name"]
    for name in named or ([method] if method is not None else []):
        with contextlib.suppress(UserError):  # it is found again, and refused, when the job is checked
            find_method(name)
    return {field: value_of(field, text) for field, text in map(split_assignment, assignments)}


def split_assignment(assignment: str) -> tuple[str, str]:
    """``"method.growth_rate=4"`` -> ``("method.growth_rate", "4")``; the value's text stays as it was typed."""
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise UserError(
            "must have the form path.to.field=value",
            field="--set",
            value=assignment,
            hint="for example --set method.growth_rate=4",
        )
    return path.strip(), text


def value_of(field: str, text: str) -> Any:
    """The value of a job file's field for a text from the command line.

    A field of text takes it as it was typed, with blanks, ``#`` and quotes. If the field takes other types besides, ``null`` or
    an empty text stands for none, and a mapping or list is read as YAML. Every other field takes YAML.
    """
    kinds = _kinds(_annotation(field))
    if "text" not in kinds:
        return yaml_value(field, text)
    if "none" in kinds and text in ("", "null"):
        return None
    value = yaml_value(field, text) if "other" in kinds else text
    return value if isinstance(value, (dict, list)) else text


def yaml_value(field: str, text: str) -> Any:
    """The value of a text as YAML, or the text itself if it is no YAML. Raises UserError if a mapping names a key twice."""
    try:
        return load_yaml(text)
    except DuplicateKey as error:
        raise UserError(str(error), field=field, value=text) from None
    except NOT_YAML:
        return text


def _annotation(path: str) -> Any:
    """The type of a dotted field; None for an unknown one. For a method's setting, that of the first method that has it."""
    current: Any = RunSpec
    for name in path.split("."):
        if dict in [get_origin(kind) for kind in (current, *get_args(current))]:
            current = float  # the only mappings are fractions and limits by device or network
            continue
        parts = [method.Config for method in known_methods()] if current == "method" else [current]
        fields = [part.model_fields[name] for part in parts if name in getattr(part, "model_fields", {})]
        if not fields:
            return None
        current = "method" if name == "method" and current is RunSpec else fields[0].annotation
    return current


def _kinds(annotation: Any) -> set[str]:
    """The kinds of value that a type takes: text, none, other. A choice of fixed words is other: YAML reads them."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {"text" if annotation is str else "none" if annotation is NoneType else "other"}
