"""The plans of one command: the job itself, other methods beside it, and fields that are varied."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.errors import UserError
from fleetune.methods.find import find_method
from fleetune.spec import (
    RunSpec,
    from_dict,
    named_method,
    parse_overrides,
    read_yaml,
    split_assignment,
    value_of,
    yaml_value,
)

MAX_VARIANTS = 200  # assumed: nobody reads a longer table


def variants(
    job: Path, assignments: Sequence[str], *, compare: str | None = None, vary: Sequence[str] = ()
) -> list[tuple[str, RunSpec]]:
    """(label, spec) of every plan: each method with each combination of the varied fields' values."""
    values, overrides = read_yaml(job), parse_overrides(list(assignments), method=named_method(job))
    axes = {field: _listed(field, text) for field, text in map(split_assignment, vary)}
    own = from_dict(values, overrides).method.name if not compare else ""
    names = [name.strip() for name in compare.split(",")] if compare else [own]
    chosen = list(itertools.product(names, *axes.values()))
    if len(chosen) > MAX_VARIANTS:
        raise UserError(f"asks for {len(chosen)} plans, more than {MAX_VARIANTS}", field="--vary", hint="vary less")
    out = []
    for name, *point in chosen:
        varied = dict(zip(axes, point, strict=True))
        fields = {**overrides, **varied}
        if compare:
            fields = _of_method(name, values, fields)
        label = ", ".join([name] * bool(compare or not axes) + [f"{field}={value}" for field, value in varied.items()])
        out.append((label, from_dict(values, fields)))
    return out


def _of_method(name: str, values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The job's fields with this method; settings that it does not have are left out."""
    settings = find_method(name, field="--compare").Config.model_fields
    fitting = {path: value for path, value in fields.items() if _field(path) is None or _field(path) in settings}
    own = values.get("method", {})
    if isinstance(own, dict) and own.get("name") == name:
        return {**fitting, "method.name": name}
    return {"method": {"name": name}, **fitting, "method.name": name}


def _field(path: str) -> str | None:
    """The setting of a method that a dotted path names; None for a field of anything else."""
    return path.split(".")[1] if path.startswith("method.") else None


def _listed(field: str, text: str) -> list[Any]:
    """The values to try: a YAML list, or values between commas, each read as ``--set`` reads it."""
    choice = yaml_value(field, text)
    if not isinstance(choice, list) and "," in text:
        choice = (
            [value_of(field, part) for part in text.split(",")] if _is_flat(text) else yaml_value(field, f"[{text}]")
        )
    if not isinstance(choice, list) or not choice:
        raise UserError("must list the values to try", field="--vary", value=f"{field}={text}", hint=f"{field}=1,2,4")
    return choice


def _is_flat(text: str) -> bool:
    """True if every comma parts two values, and none is inside a mapping or a list."""
    return not any(bracket in text for bracket in "[]{}")
