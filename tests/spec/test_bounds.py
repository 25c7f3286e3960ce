"""Every number and text of a job file has an end, and a message about it is short."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from fleetune.errors import UserError
from fleetune.methods import METHODS
from fleetune.spec import from_dict
from support import runs, tiny
from support.complaints import complaint
from support.settings import settings

UNBOUNDED = {
    "seed": "any integer of 64 bits names a run",
    "fleet.budgets.memory_bytes": "compared with what a turn needs, whatever it is",
    "fleet.budgets.seconds_per_round": "likewise",
    "fleet.budgets.joules_per_round": "likewise",
    "fleet.budgets.bytes_per_round": "likewise",
}


def numeric_fields(config: Any, prefix: str = "") -> list[str]:
    """Dotted fields that take a number."""
    found: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if hasattr(type(value), "model_fields"):
            found += numeric_fields(value, f"{prefix}{name}.")
        elif {int, float} & {field.annotation, *get_args(field.annotation)}:
            found.append(prefix + name)
    return found


OF_JOBS = [f"fedit {field}" for field in numeric_fields(from_dict({}))]
OF_METHODS = [f"{m} method.{f}" for m in METHODS for f in numeric_fields(from_dict({"method": settings(m)}).method)]
NUMERIC = [*OF_JOBS, *OF_METHODS]


@pytest.mark.parametrize("where", NUMERIC)
def test_every_number_has_an_end(where: str):
    """Beyond it, something overflows, fills the memory or goes on for ever; infinity and NaN are no numbers."""
    method, field = where.split()
    for value in (2**40, 2**62, 1e300, 1e308, float("inf"), float("-inf"), float("nan"), -1e300):
        if field in UNBOUNDED and value in (2**40, 2**62, 1e300, 1e308):
            continue
        with pytest.raises(UserError) as caught:
            from_dict({"method": settings(method)}, {field: value})
        assert caught.value.field == field
    assert {"local.steps", "model.lora.rank", "method.mu"} <= {name.split()[1] for name in NUMERIC}


def test_products_and_the_model_have_bounds_too():
    """A million steps of 65,536 examples are 6.5e10 draws; a rank of 1,000 has no place in layers of 32 x 48."""
    assert complaint({"local": {"steps": 1_000_000, "batch_size": 65_536}}).field == "local"
    spec = tiny.spec({"model.lora.rank": 1000})
    with pytest.raises(UserError, match="exceeds 48") as caught:
        runs.problem(spec)
    assert caught.value.field == "model.lora.rank"


LONG = "x" * 3_000_000


@pytest.mark.parametrize(
    "values",
    [
        {"name": LONG},
        {"model": {"base": LONG}},
        {"data": {"dataset": LONG}},
        {"data": {"template": LONG}},
        {"data": {"separator": "x" * 50_000}},
        {"method": {"name": LONG}},
        {"local": {"steps": LONG}},
        {"rounds": {"close": "x" * 90_000}},
        {"fleet": {"devices": {LONG: 1}}},
        {"fleet": {"devices": {"x" * 90_000: 1}}},
        {"fleet": {"network": "x" * 90_000}},
        {"model": {"lora": {"targets": ["x" * 90_000] * 3}}},
        {LONG: 1},
        {"x" * 90_000: 1},
        {"rounds": {"x" * 90_000: 1}},
        {"fleet": {"availability": {"kind": "trace", "path": LONG}}},
    ],
    ids=range(16),
)
def test_a_message_is_short_whatever_was_given(values: dict[str, Any]):
    """Some hundreds of characters, as text and as the document of ``--json``."""
    error = complaint(values)
    assert len(str(error)) < 1000
    assert len(json.dumps(error.to_dict())) < 1500


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "a\0b", "\ud800"])
@pytest.mark.parametrize("field", ["model.base", "data.dataset", "data.eval_dataset"])
def test_what_can_name_no_file_is_refused(field: str, name: str):
    with pytest.raises(UserError) as caught:
        from_dict({}, {field: name})
    assert caught.value.field == field
