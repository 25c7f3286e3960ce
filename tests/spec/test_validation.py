"""Errors of a job file: they name the field, the value and the way out."""

from __future__ import annotations

from typing import Any

import pytest

from fleetune.errors import UserError
from fleetune.spec import from_dict
from support.complaints import complaint


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [
        ({"metod": {}}, "metod", "did you mean 'method'?"),
        ({"rounds": {"close_": 1}}, "rounds.close_", "did you mean 'close'?"),
        ({"model": {"lora": {"rnk": 1}}}, "model.lora.rnk", "did you mean 'rank'?"),
        ({"data": {"partition": {"alfa": 1}}}, "data.partition.alfa", "did you mean 'alpha'?"),
        ({"method": {"name": "devft", "grouth_rate": 2}}, "method.grouth_rate", "did you mean 'growth_rate'?"),
        ({"method": {"name": "fedprox", "growth_rate": 2}}, "method.growth_rate", "known: mu, name"),
    ],
)
def test_an_unknown_field_is_named_with_its_neighbours(values: dict[str, Any], field: str, hint: str):
    error = complaint(values)
    assert (error.field, error.rule) == (field, "unknown field")
    assert error.hint is not None
    assert hint in error.hint


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"method": {"name": "split-lora", "split_point": 0}}, "method.split_point", 0),
        ({"method": {"name": "devft", "growth_rate": 1}}, "method.growth_rate", 1),
        ({"method": {"name": "nothing"}}, "method.name", "nothing"),
        ({"method": {"name": ["devft"]}}, "method.name", "['devft']"),
        ({"method": {}}, "method.name", None),
        ({"method": {"mu": 1}}, "method.name", None),
        ({"seed": -1}, "seed", -1),
        ({"name": ""}, "name", ""),
        ({"data": {"template": "no column"}}, "data.template", "no column"),
        ({"data": {"template": "{prompt"}}, "data.template", "{prompt"),
        ({"data": {"answer_pattern": "("}}, "data.answer_pattern", "("),
        ({"data": {"answer_pattern": "x{99999999999}"}}, "data.answer_pattern", "x{99999999999}"),
        ({"fleet": {"devices": {"jetson-nano": float("inf")}}}, "fleet.devices.jetson-nano", float("inf")),
        ({"fleet": {"network": 3}}, "fleet.network", 3),
        ({"fleet": {"network": {"wifi": 0.5}}}, "fleet.network", {"wifi": 0.5}),
        ({"model": {"lora": {"targets": 3}}}, "model.lora.targets", 3),
        ({"execution": {"workers": "few"}}, "execution.workers", "few"),
        ({"execution": {"threads": 0}}, "execution.threads", 0),
        ({"execution": {"cohort": 1.5}}, "execution.cohort", 1.5),
        ({"cost": {"model": "llama9"}}, "cost.model", "llama9"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], field: str, value: Any):
    error = complaint(values)
    assert (error.field, error.value) == (field, value)


def test_several_mistakes_are_counted():
    """The first is explained, and one knows that it is not the last."""
    error = complaint({"seed": -1, "rounds": {"num_rounds": 0, "clients_per_round": 0}})
    assert (error.field, error.hint) == ("seed", "and 2 more")


@pytest.mark.parametrize(
    ("rounds", "field"),
    [
        ({"clients_per_round": 21}, "rounds.clients_per_round"),
        ({"close": "deadline"}, "rounds.deadline_seconds"),
        ({"close": "first_k"}, "rounds.first_k"),
        ({"close": "first_k", "first_k": 6}, "rounds.first_k"),
    ],
)
def test_rules_between_fields(rounds: dict[str, Any], field: str):
    """20 clients, 5 of them a round."""
    assert complaint({"rounds": rounds}).field == field


@pytest.mark.parametrize(
    "rounds",
    [{"clients_per_round": 20}, {"close": "deadline", "deadline_seconds": 0.5}, {"close": "first_k", "first_k": 5}],
)
def test_the_edges_of_these_rules_are_allowed(rounds: dict[str, Any]):
    assert from_dict({"rounds": rounds}).rounds.model_dump(include=set(rounds)) == rounds


@pytest.mark.parametrize("name", ["hosts", "hosts_per_gpu"])
def test_a_field_of_an_earlier_version_is_refused_with_its_new_name(name: str):
    with pytest.raises(UserError, match=rf"has another name now.*execution\.{name.replace('hosts', 'workers')}"):
        from_dict({"execution": {name: 2}})
