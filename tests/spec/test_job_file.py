"""The job file: what it fills in, how it is read, and what its schema says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fleetune.errors import UserError
from fleetune.methods import METHODS
from fleetune.spec import RunSpec, from_dict, json_schema, load, parse_overrides, read_yaml
from support.settings import settings


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
    spec = from_dict({"method": settings(name)})
    assert isinstance(spec.method, METHODS[name].Config)
    assert from_dict(spec.to_dict()) == spec


def test_a_spec_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        from_dict({}).rounds.num_rounds = 3  # type: ignore[misc]


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


@pytest.mark.parametrize("text", ["name: !!binary aGk=", "name: !!set {a, b}"])
def test_types_that_no_field_takes(tmp_path: Path, text: str):
    """``b'hi'`` as text would be a name that nobody gave."""
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError, match="which no field takes"):
        load(tmp_path / "job.yaml")


def test_a_file_that_is_not_there_names_the_nearest(tmp_path: Path):
    (tmp_path / "quickstart.yml").write_text("")
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.yml\?"):
        load(tmp_path / "quickstrat.yaml")
    with pytest.raises(UserError, match=r"give the path of a \.yaml job file"):
        load(tmp_path / "nowhere" / "job.yaml")


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
