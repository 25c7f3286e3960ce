"""Overrides on the command line: each value as its field takes it, laid over the job."""

from __future__ import annotations

from typing import Any

import pytest

from fleetune.config import flatten
from fleetune.errors import UserError
from fleetune.spec import apply_overrides, from_dict, parse_overrides


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


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("data.template", "Ask {prompt} ### Answer"),
        ("data.template", "{prompt}"),
        ("data.template", "Q: {prompt}\nA:"),
        ("data.template", "- {prompt}"),
        ("name", "exp #3"),
        ("name", "007"),
        ("name", "null"),
        ("name", "2024-01-01"),
        ("name", "yes"),
        ("name", '"quoted"'),
        ("name", "a=b: [c"),
        ("data.separator", " "),
        ("data.separator", ""),
        ("data.separator", "\n\t"),
        ("data.separator", " # "),
        ("data.separator", "~"),
        ("data.columns.prompt", "12"),
        ("data.columns.prompt", "a #b"),
        ("data.eval_dataset", "~/held #out.jsonl"),
        ("data.answer_pattern", "# (.*)"),
        ("data.partition.key", "true"),
        ("tracking.uri", "http://worker/#x"),
        ("tracking.experiment", "1e3"),
        ("model.base", "0x10"),
    ],
)
def test_a_field_of_text_takes_what_was_typed(field: str, text: str):
    """Whatever YAML would make of it: a comment, a number, a date, a mapping, nothing."""
    assert flatten(from_dict({}, parse_overrides([f"{field}={text}"])).to_dict())[field] == text


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("data.eval_dataset=null", None),
        ("cost.model=", None),
        ("data.eval_dataset=None", "None"),
        ("fleet.network=wifi", "wifi"),
        ("fleet.network={wifi: 0.5, lte: 0.5}", {"wifi": 0.5, "lte": 0.5}),
        ("fleet.network.wifi=1", 1),
        ("execution.workers=auto", "auto"),
        ("execution.workers=3", 3),
        ("model.lora.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("model.lora.targets=q_proj # one", "q_proj"),
        ("local.max_grad_norm=null", None),
        ("fleet.budgets.memory_bytes={jetson-nano: 1.0e+9}", {"jetson-nano": 1e9}),
        ("tracking={uri: x #y}", "{uri: x #y}"),  # a part of the job is YAML, and this is none
    ],
)
def test_other_fields_take_yaml_and_null_stands_for_none(assignment: str, value: Any):
    assert list(parse_overrides([assignment]).values()) == [value]


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
