"""The job file: what it fills in, what overrides do to it, what identifies a run, and how errors name things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from fleetune.config import flatten
from fleetune.errors import UserError
from fleetune.methods import METHODS
from fleetune.spec import (
    RunSpec,
    apply_overrides,
    from_dict,
    json_schema,
    load,
    parse_overrides,
    read_yaml,
)
from support import runs, tiny


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


# -- what identifies a run ----------------------------------------------------------------------------------------------------
SAME = {
    "name": "other",
    "tracking.enabled": False,
    "tracking.uri": "http://x",
    "execution.kind": "serial",
    "execution.workers": 3,
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
    ("text", "name", "lines"),
    [
        ("rounds: {num_rounds: 1}\nseed: 1\nrounds: {num_rounds: 2}\n", "rounds", (1, 3)),
        ("rounds:\n  num_rounds: 1\n  close: all\n  num_rounds: 2\n", "num_rounds", (2, 4)),
        ("seed: 1\n'seed': 2\n", "seed", (1, 2)),
        ("fleet: {devices: {jetson-nano: 0.5,\n jetson-nano: 0.5}}", "jetson-nano", (1, 2)),
        ("a: &a {seed: 1}\nb:\n  <<: *a\n  <<: *a\n", "<<", (3, 4)),
        ("x: [{a: 1, b: 2, a: 3}]", "a", (1, 1)),
        ("1: a\n'1': b\n", "1", (1, 2)),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, name: str, lines: tuple[int, int]
):
    """PyYAML alone keeps the last one."""
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "job.yaml")
    assert f"{name!r} is given twice, in line {lines[0]} and in line {lines[1]}" in caught.value.rule


def test_a_key_that_stands_twice_in_an_override_is_refused():
    with pytest.raises(UserError, match="'lte' is given twice") as caught:
        parse_overrides(["fleet.network={lte: 0.5, lte: 0.5}"])
    assert caught.value.field == "fleet.network"


def test_merged_keys_may_be_given_again(tmp_path: Path):
    """That is what ``<<`` is for: the mapping's own keys win, and an alias is the same mapping once more."""
    text = """
rounds: &few {num_rounds: 2, clients_per_round: 2}
other: {<<: *few, num_rounds: 3}
third: {<<: [*few, {close: all}], close: first_k}
same: *few
"""
    (tmp_path / "job.yaml").write_text(text)
    values = read_yaml(tmp_path / "job.yaml")
    assert values["other"] == {"num_rounds": 3, "clients_per_round": 2}
    assert values["third"] == {"num_rounds": 2, "clients_per_round": 2, "close": "first_k"}
    assert values["same"] == values["rounds"]


# -- bounds -------------------------------------------------------------------------------------------------------------------
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
OF_METHODS = [f"{m} method.{f}" for m in METHODS for f in numeric_fields(from_dict({"method": {"name": m}}).method)]
NUMERIC = [*OF_JOBS, *OF_METHODS]


@pytest.mark.parametrize("where", NUMERIC)
def test_every_number_has_an_end(where: str):
    """Beyond it, something overflows, fills the memory or goes on for ever; infinity and NaN are no numbers."""
    method, field = where.split()
    for value in (2**40, 2**62, 1e300, 1e308, float("inf"), float("-inf"), float("nan"), -1e300):
        if field in UNBOUNDED and value in (2**40, 2**62, 1e300, 1e308):
            continue
        with pytest.raises(UserError) as caught:
            from_dict({"method": {"name": method}}, {field: value})
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


@pytest.mark.parametrize("text", ["name: !!binary aGk=", "name: !!set {a, b}"])
def test_types_that_no_field_takes(tmp_path: Path, text: str):
    """``b'hi'`` as text would be a name that nobody gave."""
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError, match="which no field takes"):
        load(tmp_path / "job.yaml")


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


@pytest.mark.parametrize("name", ["hosts", "hosts_per_gpu"])
def test_a_field_of_an_earlier_version_is_refused_with_its_new_name(name: str):
    with pytest.raises(UserError, match=rf"has another name now.*execution\.{name.replace('hosts', 'workers')}"):
        from_dict({"execution": {name: 2}})
