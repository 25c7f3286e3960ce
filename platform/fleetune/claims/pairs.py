"""Which cells of a sweep's grid a claim compares: cells that differ in the claim's own fields alone.

A cell is one combination of the grid's values, seed aside. Every cell is run with every seed, so two cells give a pair for
each seed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetune.claims.config import AnyClaim, Better, Peak, Ratio, Trend, setting_text
from fleetune.config import flatten
from fleetune.errors import UserError, unknown_name
from fleetune.records.naming import filled_fields, shown

SEED = "seed"

Cell = dict[str, Any]
"""Dotted field -> value."""


@dataclass(frozen=True)
class Comparison:
    """The settings that a claim compares, and for each combination of all else that was swept the cell of each setting."""

    settings: tuple[Cell, ...]
    groups: tuple[tuple[int, ...], ...]
    """``[G, S]``: for each of G combinations the place of each of S settings' cells among the grid's cells."""


def cells_of(grid: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination of a grid's values, seed aside, as dotted fields: a value that is a mapping sets several."""
    axes = {field: values for field, values in grid.items() if field != SEED}
    combinations = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return list({key_of(cell): cell for cell in map(flatten, combinations)}.values())


def seeds_of(grid: Mapping[str, Sequence[Any]], seeds: Sequence[int] | None) -> list[int]:
    """The seeds of a sweep, each once: its ``seeds``, or those of its grid."""
    return list(dict.fromkeys(seeds or grid.get(SEED) or ()))


def key_of(overrides: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """What a trial sets, seed aside, in a form that is the same for a cell and for its row in ``trials.parquet``.

    The table holds a mixture of types as text and 2 as 2.0, and no value for null.
    """
    return frozenset((field, word(value)) for field, value in filled_fields(overrides).items() if field != SEED)


def word(value: Any) -> str:
    """A value as text, the same for 2, 2.0 and "2"."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return repr(float(value))
    return value if isinstance(value, str) else json.dumps(value)


def check(claims: Sequence[AnyClaim], grid: Mapping[str, Sequence[Any]] | None, seeds: Sequence[int] | None) -> None:
    """Raises UserError for claims that this grid and these seeds cannot decide."""
    if not claims:
        return
    if grid is None:
        hint = "give a grid; a search draws its values, so that hardly two trials differ in one field alone"
        raise UserError("need a grid, whose cells they compare", field="claims", hint=hint)
    found = seeds_of(grid, seeds)
    if len(found) < 2:
        rule = "need two seeds at least: one run alone does not tell an effect from chance"
        raise UserError(rule, field="claims", value=f"seeds {found}", hint="seeds: [0, 1, 2, 3, 4]")
    cells = cells_of(grid)
    for i, claim in enumerate(claims):
        compared(claim, cells, field=f"claims.{i}")


def compared(claim: AnyClaim, cells: Sequence[Cell], *, field: str) -> Comparison:
    """What a claim compares. ``field`` is the claim's place in the sweep file.

    Raises UserError if it names a field or a value that the cells lack, or if no cells form a pair.
    """
    _check_setting(claim.only, cells, f"{field}.for")
    chosen = [place for place, cell in enumerate(cells) if _has(cell, claim.only)]
    if not chosen:
        hint = "each of its values is in the grid, but not together"
        raise UserError(
            "is the setting of no cell of the grid", field=f"{field}.for", value=setting_text(claim.only), hint=hint
        )
    named = _named_settings(claim, [cells[place] for place in chosen], cells, field)
    settings = tuple(setting for _, setting in named)
    places = [[place for place in chosen if _has(cells[place], setting)] for setting in settings]
    for (name, setting), there in zip(named, places, strict=True):
        if not there:
            hint = (
                "look at what `for` leaves of the grid"
                if claim.only
                else "each of its values is in the grid, but not together"
            )
            raise UserError("is the setting of no cell of the grid", field=name, value=setting_text(setting), hint=hint)
    named_fields = {name for setting in settings for name in setting}
    # A field that some of these cells lack came with another one, as initial_capacity comes with the method: no pair could
    # agree in it.
    used = [cells[place] for place in dict.fromkeys(itertools.chain(*places))]
    others = [name for name in _fields(used) if name not in named_fields and all(name in cell for cell in used)]
    groups: dict[tuple[str, ...], list[int | None]] = {}
    for nth, (name, _) in enumerate(named):
        for place in places[nth]:
            rest = tuple(word(cells[place][other]) for other in others)
            group = groups.setdefault(rest, [None] * len(settings))
            first = group[nth]
            if first is not None:
                raise _ambiguous(name, settings[nth], cells[first], cells[place])
            group[nth] = place
    whole = tuple(tuple(p for p in group if p is not None) for group in groups.values() if None not in group)
    if not whole:
        raise _no_pair(field, settings, used, named_fields)
    if any(len(set(group)) < len(group) for group in whole):
        raise UserError("is the same setting as the other side", field=named[1][0], value=setting_text(settings[1]))
    return Comparison(settings, whole)


def _named_settings(
    claim: AnyClaim, chosen: Sequence[Cell], cells: Sequence[Cell], field: str
) -> list[tuple[str, Cell]]:
    """(place in the sweep file, setting) of every setting that a claim compares; a peak's own comes first."""
    if isinstance(claim, Better):
        sides = [(f"{field}.better", claim.better), (f"{field}.than", claim.than)]
    elif isinstance(claim, Ratio):
        sides = [(f"{field}.ratio.of", claim.ratio.of), (f"{field}.ratio.to", claim.ratio.to)]
    else:
        return _values_of_field(claim, chosen, cells, field)
    for name, setting in sides:
        _check_setting(setting, cells, name)
    (_, first), (second_name, second) = sides
    if key_of(first) == key_of(second):
        hint = "a claim compares two settings"
        raise UserError(
            "is the same setting as the other side", field=second_name, value=setting_text(second), hint=hint
        )
    return sides


def _values_of_field(
    claim: Trend | Peak, chosen: Sequence[Cell], cells: Sequence[Cell], field: str
) -> list[tuple[str, Cell]]:
    """The settings of a claim over a swept field: for a trend in ascending order, for a peak its own first."""
    if isinstance(claim, Peak):
        _check_setting(claim.peaks_at, cells, f"{field}.peaks_at")
        name, place = next(iter(claim.peaks_at)), f"{field}.peaks_at"
    else:
        name, place = claim.over, f"{field}.over"
        _check_field(name, cells, place)
    values = list({word(cell[name]): cell[name] for cell in chosen if name in cell}.values())
    if len(values) < 2:
        hint = "the grid needs two values of it at least, also among those that `for` leaves"
        raise UserError("has a single value", field=place, value=name, hint=hint)
    if isinstance(claim, Peak):
        peak = word(claim.peaks_at[name])
        values.sort(key=lambda value: word(value) != peak)
    elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        values.sort()
    else:
        rule, hint = "has values that are no numbers, so that they have no order", "compare two of them with `better`"
        raise UserError(rule, field=place, value=name, hint=hint)
    return [(place, {name: value}) for value in values]


def _check_setting(setting: Cell, cells: Sequence[Cell], field: str) -> None:
    for name, value in setting.items():
        _check_field(name, cells, f"{field}.{name}")
        values = {word(cell[name]): cell[name] for cell in cells if name in cell}
        if word(value) not in values:
            hint = f"the grid has {', '.join(shown(v) for v in values.values())}"
            raise UserError("is none of the grid's values", field=f"{field}.{name}", value=value, hint=hint)


def _check_field(name: str, cells: Sequence[Cell], field: str) -> None:
    if name == SEED:
        rule, hint = "is what pairs are made by, so that no claim can be about it", "name another field of the grid"
        raise UserError(rule, field=field, value=name, hint=hint)
    if name not in (known := _fields(cells)):
        raise unknown_name("field in the grid", name, known, field=field)


def _fields(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell))


def _has(cell: Cell, setting: Cell) -> bool:
    return all(name in cell and word(cell[name]) == word(value) for name, value in setting.items())


def _ambiguous(field: str, setting: Cell, first: Cell, second: Cell) -> UserError:
    names = [name for name in _fields([first, second]) if word(first.get(name)) != word(second.get(name))]
    rule = f"is several cells of the grid, which differ in {', '.join(names)}"
    hint = "name these fields on both sides, or choose one value with `for`"
    return UserError(rule, field=field, value=setting_text(setting), hint=hint)


def _no_pair(field: str, settings: Sequence[Cell], used: Sequence[Cell], named: set[str]) -> UserError:
    names = [name for name in _fields(used) if name not in named and all(name in cell for cell in used)]
    texts = " and ".join(setting_text(setting) for setting in settings[:2])
    hint = f"name {' or '.join(names)} on both sides"
    return UserError("no cells of the grid differ in these settings alone", field=field, value=texts, hint=hint)
