"""The job file: what it fills in, what overrides do to it, what identifies a run, and how errors name things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fleetune.errors import UserError
from fleetune.methods import METHODS
from fleetune.spec import (
    RunSpec,
    apply_overrides,
    flatten,
    from_dict,
    json_schema,
    load,
    parse_overrides,
    read_yaml,
)


def test_an_empty_job_is_the_default_one(tmp_path: Path):
    (tmp_path / "job.yaml").write_text("# nothing but a comment\n")
    assert load(tmp_path / "job.yaml") == from_dict({}) == RunSpec()


def test_a_job_file_and_its_overrides(tmp_path: Path):
    """The override wins over the file, the file over the default."""
    (tmp_path / "job.yaml").write_text("seed: 3\nrounds: {num_rounds: 7, clients_per_round: 2}\n")
    spec = load(tmp_path / "job.yaml", {"rounds.num_rounds": 9, "model.lora.rank": 4})
    assert (spec.seed, spec.rounds.num_rounds, spec.rounds.clients_per_round) == (3, 9, 2)
    assert (spec.model.lora.rank, spec.model.lora.alpha, spec.model.lora.scaling) == (4, 16.0, 4.0)
    assert read_yaml(tmp_path / "job.yaml") == {"seed": 3, "rounds": {"num_rounds": 7, "clients_per_round": 2}}


@pytest.mark.parametrize("name", METHODS)
def test_plain_data_is_a_job_again(name: str):
    spec = from_dict({"method": {"name": name}})
    assert isinstance(spec.method, METHODS[name].Config)
    assert from_dict(spec.to_dict()) == spec


def test_a_spec_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        from_dict({}).rounds.num_rounds = 3  # type: ignore[misc]


# -- overrides --------------------------------------------------------------------------------------------------------------
def test_assignments_are_yaml():
    assignments = [
        "a=4",
        "a.b=1.5",
        " c =[1, x]",
        "d={e: null}",
        "f=",
        "g=1=2",
        "h=true",
        "i=text: [",
        "j=3.0e-3",
        "k=1e-3",
    ]
    parsed = parse_overrides(assignments)
    assert parsed == {
        "a": 4,
        "a.b": 1.5,
        "c": [1, "x"],
        "d": {"e": None},
        "f": None,
        "g": "1=2",
        "h": True,
        "i": "text: [",  # no YAML, so the text itself
        "j": 0.003,
        "k": "1e-3",  # YAML 1.1 wants a dot; the field takes the text for a number all the same
    }
    assert from_dict({}, {"local.learning_rate": parsed["k"]}).local.learning_rate == 0.001


@pytest.mark.parametrize("assignment", ["", "=", "= 3", "rounds.num_rounds", "rounds.num_rounds 3"])
def test_an_assignment_needs_a_field_and_a_sign(assignment: str):
    with pytest.raises(UserError) as caught:
        parse_overrides(["seed=1", assignment])
    assert (caught.value.field, caught.value.value) == ("--set", assignment)


def test_overrides_leave_the_job_as_it_was():
    job: dict[str, Any] = {"rounds": {"num_rounds": 7}}
    assert apply_overrides(job, {"rounds.first_k": 2, "fleet.dropout": 0.1}) == {
        "rounds": {"num_rounds": 7, "first_k": 2},
        "fleet": {"dropout": 0.1},
    }
    assert job == {"rounds": {"num_rounds": 7}}


def test_another_method_starts_from_its_own_defaults():
    """mu is FedProx's, so it does not stay behind to be refused; the same method keeps its settings."""
    job = {"method": {"name": "fedprox", "mu": 0.5}}

    def method(overrides: dict[str, Any]) -> dict[str, Any]:
        return from_dict(job, overrides).method.model_dump()

    assert method({"method.name": "devft"}) == from_dict({"method": {"name": "devft"}}).method.model_dump()
    assert method({"method.name": "fedprox"})["mu"] == 0.5
    assert method({"method.name": "devft", "method.growth_rate": 4})["growth_rate"] == 4
    assert method({"method.growth_rate": 4, "method.name": "devft"})["growth_rate"] == 4


def test_flatten_and_override_are_inverse():
    values = from_dict({"seed": 5, "method": {"name": "devft"}}).to_dict()
    flat = flatten(values)
    assert (flat["seed"], flat["method.name"], flat["model.lora.rank"]) == (5, "devft", 8)
    assert apply_overrides({}, flat) == values
    assert flatten({"a": {}, "b": {"c": [1]}}) == {"a": {}, "b.c": [1]}


# -- what identifies a run ----------------------------------------------------------------------------------------------------
SAME = {
    "name": "other",
    "tracking.enabled": False,
    "tracking.uri": "http://x",
    "execution.kind": "serial",
    "execution.hosts": 3,
}
ANOTHER = {
    "seed": 1,
    "rounds.num_rounds": 21,
    "model.lora.alpha": 17.0,
    "data.partition.alpha": 0.6,
    "fleet.network": "lte",
    "local.steps": 9,
    "method.name": "fedavg",
    "evaluation.every": 4,
    "cost.precision": "bf16",
    "execution.cohort": 3,  # products of other shapes round differently
    "execution.threads": 2,
}


@pytest.mark.parametrize("field", SAME)
def test_what_cannot_change_results_is_not_in_the_hash(field: str):
    assert from_dict({}, {field: SAME[field]}).spec_hash == from_dict({}).spec_hash


@pytest.mark.parametrize("field", ANOTHER)
def test_what_can_change_results_is_in_the_hash(field: str):
    assert from_dict({}, {field: ANOTHER[field]}).spec_hash != from_dict({}).spec_hash


def test_the_hash_does_not_depend_on_how_the_job_was_written():
    """Order, spelt-out defaults and a number as text make no other run."""
    one = from_dict({"seed": 2, "rounds": {"num_rounds": 5, "clients_per_round": 2}})
    other = from_dict({"rounds": {"clients_per_round": "2", "num_rounds": 5.0, "close": "all"}, "seed": 2})
    assert one.spec_hash == other.spec_hash
    assert len(one.spec_hash) == 16


# -- errors -------------------------------------------------------------------------------------------------------------------
def complaint(values: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        from_dict(values)
    return caught.value


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
        ({"execution": {"hosts": "few"}}, "execution.hosts", "few"),
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


def test_a_file_that_is_not_there_names_the_nearest(tmp_path: Path):
    (tmp_path / "quickstart.yml").write_text("")
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.yml\?"):
        load(tmp_path / "quickstrat.yaml")
    with pytest.raises(UserError, match=r"give the path of a \.yaml job file"):
        load(tmp_path / "nowhere" / "job.yaml")


# -- the schema ---------------------------------------------------------------------------------------------------------------
def test_every_field_says_what_it_is():
    """Editors show the description; only a method's own name needs none."""
    schema = json_schema()
    parts = {"RunSpec": schema, **schema["$defs"]}
    silent = [
        f"{part}.{name}"
        for part, definition in parts.items()
        for name, field in definition.get("properties", {}).items()
        if not field.get("description") and not (name == "name" and "const" in field)
    ]
    assert silent == []
    assert {METHODS[name].Config.__name__ for name in METHODS} <= set(schema["$defs"])
