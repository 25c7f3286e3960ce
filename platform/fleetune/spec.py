"""One run as data: a YAML job file into frozen models, with overrides by dotted path, and errors that say what to do."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import Field, ValidationError

from fleetune.config import Config, flatten
from fleetune.data.config import DataConfig
from fleetune.errors import UserError, nearest, unknown_name
from fleetune.fleet.fleet import FleetConfig
from fleetune.methods import METHODS
from fleetune.methods.fedavg import FedITConfig
from fleetune.models.config import ModelConfig
from fleetune.redaction import redacted
from fleetune.run_config import CostConfig, EvaluationConfig, ExecutionConfig, RoundsConfig
from fleetune.tracking.config import TrackingConfig
from fleetune.training.config import LocalConfig
from fleetune.yaml_text import NOT_YAML, DuplicateKey
from fleetune.yaml_text import load as load_yaml

if TYPE_CHECKING:
    from fleetune.methods.base import MethodConfig as AnyMethodConfig
else:
    _configs = functools.reduce(operator.or_, (method.Config for method in METHODS.values()))
    AnyMethodConfig = Annotated[_configs, Field(discriminator="name")]


TRIED_TYPE = re.compile(r"(int|str|float|bool|(literal|dict|tuple|list)\[.*)$")  # in pydantic's error locations
MAX_DEPTH = 50  # assumed: a job file has five levels
MAX_VALUES = 10_000  # assumed: a job file has a hundred; aliases of aliases double with every line
MAX_TEXT = 100_000  # assumed, in characters: a template of many pages
MAX_INTEGER = 2**63 - 1

# Fields and parts that change no bit of a result, and why. All others are in the hash.
NO_RESULT_CHANGES = {
    "name": "what a run is called",
    "tracking": "where records are sent",
    "execution.kind": "serial or Ray: units, cohorts and the order of sums follow from the job alone",
    "execution.workers": "how many processes the same units go through",
    "execution.workers_per_gpu": "which of them share a GPU",
}

FORMER_NAMES = {
    "execution.hosts": "execution.workers",
    "execution.hosts_per_gpu": "execution.workers_per_gpu",
}
"""Fields of job files of earlier versions -> what they are called now."""


class RunSpec(Config):
    """Everything that determines a run."""

    name: str = Field("run", min_length=1, max_length=100)
    """Name of the job; runs of one name share an MLflow experiment."""
    seed: int = Field(0, ge=0, le=MAX_INTEGER)
    """Every random draw of the run is derived from it."""
    model: ModelConfig = ModelConfig()
    """The base model and its adapter."""
    data: DataConfig = DataConfig()
    """What is learnt, and who holds which part of it."""
    fleet: FleetConfig = FleetConfig()
    """The clients' devices and links."""
    rounds: RoundsConfig = RoundsConfig()
    """Rounds, sampling and closing."""
    local: LocalConfig = LocalConfig()
    """A client's optimizer steps."""
    method: AnyMethodConfig = FedITConfig()
    """The federated method and its settings."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the global model is evaluated."""
    cost: CostConfig = CostConfig()
    """What is costed."""
    execution: ExecutionConfig = ExecutionConfig()
    """Where the work runs."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the records are sent."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, as in a job file with every default filled in."""
        return self.model_dump(mode="json")

    @property
    def spec_hash(self) -> str:
        """The spec's part of a run's identity: all fields but those that change no result. What is read is the other part
        (`content`).
        """
        values = {field: value for field, value in flatten(self.to_dict()).items() if changes_results(field)}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def changes_results(field: str) -> bool:
    """Whether a run's results depend on a dotted field, so that the field is part of the run's identity."""
    return not any(field == each or field.startswith(f"{each}.") for each in NO_RESULT_CHANGES)


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """Read a job file, apply ``{"method.growth_rate": 4}``, check everything that needs no model and no data."""
    return from_dict(read_yaml(path), overrides)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError where there is no file, no YAML or no mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        beside = [p.name for p in path.parent.glob("*.y*ml")] if os.path.isdir(path.parent) else []
        guess = nearest(path.name, beside)
        hint = f"did you mean {path.parent / guess}?" if guess else "give the path of a .yaml job file"
        raise UserError(f"the job file cannot be read: {error}", field="JOB", value=str(path), hint=hint) from None
    try:
        values = load_yaml(text)
    except NOT_YAML as error:
        reason = " ".join(str(error).split())
        raise UserError(f"not valid YAML: {reason}", field="JOB", value=str(path)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            "must hold a mapping of fields", field="JOB", value=str(path), hint="see docs/reference/job_file.md"
        )
    return values


def job_text(path: str | Path, assignments: list[str]) -> str:
    """A job or sweep file as it was launched: its text, and each ``--set`` as a comment. Passwords in it are left out."""
    lines = [Path(path).read_text(encoding="utf-8").rstrip(), *(f"# --set {each}" for each in assignments)]
    return redacted("\n".join(lines))


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """``["method.growth_rate=4"]`` -> ``{"method.growth_rate": 4}``; each value as its field takes it (`value_of`)."""
    return {field: value_of(field, text) for field, text in map(split_assignment, assignments)}


def split_assignment(assignment: str) -> tuple[str, str]:
    """``"method.growth_rate=4"`` -> ``("method.growth_rate", "4")``; the value's text as it was typed."""
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
    """What a text on the command line means for a field of the job file.

    A field of text takes it as it was typed, blanks, ``#`` and quotes included. Where text is one possibility among others,
    ``null`` or nothing at all stands for none, and a mapping or list is read as YAML. Every other field takes YAML.
    """
    kinds = _kinds(_annotation(field))
    if "text" not in kinds:
        return yaml_value(field, text)
    if "none" in kinds and text in ("", "null"):
        return None
    value = yaml_value(field, text) if "other" in kinds else text
    return value if isinstance(value, (dict, list)) else text


def yaml_value(field: str, text: str) -> Any:
    """A text as YAML, or itself where it is none. UserError where a mapping in it names a key twice."""
    try:
        return load_yaml(text)
    except DuplicateKey as error:
        raise UserError(str(error), field=field, value=text) from None
    except NOT_YAML:
        return text


def _annotation(path: str) -> Any:
    """The type of a dotted field; None for one that there is not. A method's setting: of any method that has it."""
    place: Any = RunSpec
    for name in path.split("."):
        if dict in [get_origin(kind) for kind in (place, *get_args(place))]:
            place = float  # fractions and limits by device or network are the only mappings
            continue
        parts = [method.Config for method in METHODS.values()] if place == "method" else [place]
        fields = [part.model_fields[name] for part in parts if name in getattr(part, "model_fields", {})]
        if not fields:
            return None
        place = "method" if name == "method" and place is RunSpec else fields[0].annotation
    return place


def _kinds(annotation: Any) -> set[str]:
    """Of what a type is: text, none, other. A choice of given words is other: YAML reads them."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {"text" if annotation is str else "none" if annotation is NoneType else "other"}


def from_dict(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """Validate plain data with overrides laid over it."""
    merged = apply_overrides(values, overrides or {})
    try:
        spec = RunSpec.model_validate(merged)
    except ValidationError as error:
        raise as_user_error(error, RunSpec) from None
    _check(spec)
    return spec


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay dotted fields over nested data. Another ``method.name`` starts from that method's defaults."""
    out = plain(values)
    overrides = {path: plain(value, path) for path, value in overrides.items()}
    name = overrides.get("method.name")
    if name is not None and isinstance(out.get("method"), dict) and out["method"].get("name") != name:
        out["method"] = {"name": name}
    for path, value in overrides.items():
        place = out
        *parents, last = path.split(".")
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return out


def plain(value: Any, field: str = "", depth: int = 0, budget: Iterator[int] | None = None) -> Any:
    """A copy of what YAML gave, in JSON's types, dates as text. UserError for what has no end, what 64 bits cannot hold, and
    types that no field takes.
    """
    budget = iter(range(MAX_VALUES)) if budget is None else budget
    if depth > MAX_DEPTH or next(budget, None) is None:
        rule = "is nested too deeply, or holds itself" if depth > MAX_DEPTH else f"holds more than {MAX_VALUES} values"
        raise UserError(rule, field=field.partition(".")[0] or "JOB")
    if isinstance(value, Mapping):
        named = {str(plain(key, field, depth + 1, budget)): part for key, part in value.items()}
        return {name: plain(part, f"{field}.{name}".lstrip("."), depth + 1, budget) for name, part in named.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, field, depth + 1, budget) for part in value]
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise UserError("is too large a number", field=field or "JOB", hint="integers have 64 bits")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise UserError(f"is longer than {MAX_TEXT} characters", field=field or "JOB", value=value)
    if isinstance(value, (bytes, set, frozenset)):
        raise UserError(f"is of YAML's type {type(value).__name__}, which no field takes", field=field or "JOB")
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def json_schema() -> dict[str, Any]:
    """The job file's JSON schema, for editors and for the reference page."""
    return RunSpec.model_json_schema()


def as_user_error(error: ValidationError, root: type[Config]) -> UserError:
    """The first error in our words: dotted field, value, rule, and the nearest right name. ``root``: what was validated."""
    errors = error.errors(include_url=False)
    first = errors[0]
    where = _place(first["loc"])
    field = ".".join(where)
    if first["type"] == "extra_forbidden" and field in FORMER_NAMES:
        return UserError("has another name now", field=field, hint=f"it is called {FORMER_NAMES[field]}")
    if first["type"] == "extra_forbidden":
        known = _fields_at(root, where[:-1], first["loc"])
        misspelt = unknown_name("field", where[-1], known, field=field)
        return UserError("unknown field", field=field, hint=misspelt.hint)
    if first["type"] == "union_tag_invalid":
        return unknown_name("method", str(first["ctx"]["tag"]), METHODS, field="method.name")
    if first["type"] == "union_tag_not_found":
        return UserError("the method needs a name", field="method.name", hint=f"one of {', '.join(METHODS)}")
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, UserError):
        return raised
    here = [e for e in errors if _place(e["loc"]) == where]  # one for each type that the field may have
    rule = " or ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in here))
    value = first.get("input")
    shown = value if isinstance(value, (str, int, float, bool, list, type(None))) else type(value).__name__
    others = len(errors) - len(here)
    return UserError(rule, field=field or "JOB", value=shown, hint=f"and {others} more" if others else None)


def _place(loc: tuple[Any, ...]) -> list[str]:
    """Where an error is, as the job file has it: without the method's tag and the types that were tried."""
    where = [str(part) for part in loc]
    if where[:1] == ["method"] and len(where) > 1 and where[1] in METHODS:
        del where[1]
    return [part for i, part in enumerate(where) if i < 2 or not TRIED_TYPE.match(part)]


def _fields_at(root: type[Config], path: list[str], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields where an unknown one was found."""
    model: Any = root
    for part in path:
        if part == "method" and model is RunSpec:
            model = METHODS[str(loc[1])].Config
            continue
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def _check(spec: RunSpec) -> None:
    """Rules between parts of the job file."""
    rounds, fleet = spec.rounds, spec.fleet
    if rounds.clients_per_round > fleet.num_clients:
        raise UserError(
            f"exceeds the fleet of {fleet.num_clients} clients",
            field="rounds.clients_per_round",
            value=rounds.clients_per_round,
            hint="lower it, or raise fleet.num_clients",
        )
    if rounds.close == "deadline" and rounds.deadline_seconds is None:
        raise UserError(
            "is needed for rounds.close=deadline",
            field="rounds.deadline_seconds",
            hint="give virtual seconds; fleetune run … --json shows how long clients take",
        )
    if rounds.close == "first_k" and rounds.first_k is None:
        raise UserError(
            "is needed for rounds.close=first_k",
            field="rounds.first_k",
            hint=f"give a number from 1 to {rounds.clients_per_round}",
        )
    if rounds.first_k is not None and rounds.first_k > rounds.clients_per_round:
        raise UserError(
            f"exceeds rounds.clients_per_round={rounds.clients_per_round}",
            field="rounds.first_k",
            value=rounds.first_k,
            hint="lower it",
        )
    if spec.cost.model is not None:
        from fleetune.models.architectures import architecture

        architecture(spec.cost.model)  # raises UserError where there is none
