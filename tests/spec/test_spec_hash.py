"""The spec's part of a run's identity: every field of it that changes results, and no other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from fleetune.fleet.fleet import build_fleet
from fleetune.methods import METHODS
from fleetune.spec import RunSpec, from_dict
from support import tiny
from support.settings import settings

NO_RESULT_CHANGES = {
    "name": "a label",
    "tracking.enabled": "records are sent, or not",
    "tracking.uri": "where to",
    "tracking.experiment": "under which name",
    "tracking.system_metrics": "with the machine's load beside them",
    "execution.kind": "serial and Ray give the same bits: tests/engine/test_ray.py",
    "execution.workers": "as many as there are give the same bits: tests/engine/test_ray.py",
    "execution.workers_per_gpu": "likewise",
}


def fields_of(config: BaseModel, prefix: str = "") -> list[str]:
    """Dotted fields, whatever their type; a part of the spec is walked, anything else is one field."""
    found = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        found += fields_of(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [prefix + name]
    return found


def with_another(config: BaseModel, path: str) -> BaseModel:
    """A copy in which one field holds something else; what may stand there is not asked."""
    name, _, rest = path.partition(".")
    value = getattr(config, name)
    return config.model_copy(update={name: with_another(value, rest) if rest else f"not {value}"})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("method", METHODS)
def test_every_field_changes_the_hash_or_is_on_the_list(method: str):
    """A new field is in the hash without anybody's doing. One that is not stands on the list, with the reason."""
    spec = from_dict({"method": settings(method)})
    walked = fields_of(spec)
    assert {path.partition(".")[0] for path in walked} == set(RunSpec.model_fields)
    assert {path for path in walked if path.startswith("method.")} == {
        f"method.{n}" for n in type(spec.method).model_fields
    }
    same = {path for path in walked if with_another(spec, path).spec_hash == spec.spec_hash}  # type: ignore[attr-defined]
    assert same == NO_RESULT_CHANGES.keys()


@pytest.mark.parametrize("field", ["execution.kernels", "execution.cohort", "execution.threads", "execution.precision"])
def test_what_rounds_differently_is_another_run(field: str):
    """Compiled kernels and PyTorch's differ in 1e-3 of an adapter; a sweep over both has two trials."""
    values = {"execution.kernels": ["torch", "compiled"], "execution.precision": ["fp32", "bf16"]}.get(field, [1, 2])
    one, other = (tiny.spec({field: value}).spec_hash for value in values)
    assert one != other


def test_the_order_of_a_mapping_decides_nothing():
    """Of three clients on two kinds of devices, one kind gets two: the same one, whichever is written first."""
    parts: dict[str, Any] = {"devices": {"server-a100": 0.5, "jetson-nano": 0.5}, "network": {"lte": 0.5, "wifi": 0.5}}
    turned = {name: dict(reversed(part.items())) for name, part in parts.items()}
    one, other = (
        from_dict({"fleet": {"num_clients": 3, **p}, "rounds": {"clients_per_round": 3}}) for p in (parts, turned)
    )
    assert one.spec_hash == other.spec_hash
    fleets = [build_fleet(spec.fleet, 0) for spec in (one, other)]
    names = [([f.profile(c).name for c in range(3)], [f.network(c).name for c in range(3)]) for f in fleets]
    assert names[0] == names[1]


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


def test_a_field_that_came_later_leaves_the_hash_as_it_was():
    """The hash of the default job before `rounds.max_sim_seconds` was there; with a limit it is another run."""
    assert from_dict({}).spec_hash == "9ff79b8682c7b25c"
    assert from_dict({}, {"rounds.max_sim_seconds": 60}).spec_hash != "9ff79b8682c7b25c"


def test_the_hash_does_not_depend_on_how_the_job_was_written():
    """Order, spelt-out defaults and a number as text make no other run."""
    one = from_dict({"seed": 2, "rounds": {"num_rounds": 5, "clients_per_round": 2}})
    other = from_dict({"rounds": {"clients_per_round": "2", "num_rounds": 5.0, "close": "all"}, "seed": 2})
    assert one.spec_hash == other.spec_hash
    assert len(one.spec_hash) == 16
