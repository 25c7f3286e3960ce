"""Errors of a job file in the user's words, and the rules between its parts."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from fleetune.config import Config
from fleetune.errors import UserError, unknown_name
from fleetune.methods import METHODS
from fleetune.spec.run_spec import RunSpec

TRIED_TYPE = re.compile(r"(int|str|float|bool|(literal|dict|tuple|list)\[.*)$")  # in pydantic's error locations

FORMER_NAMES = {
    "execution.hosts": "execution.workers",
    "execution.hosts_per_gpu": "execution.workers_per_gpu",
}
"""Fields of job files of earlier versions -> their names now."""


def as_user_error(error: ValidationError, root: type[Config], *, at: str | None = None) -> UserError:
    """The first error of a validation: dotted field, value, rule, and the nearest right name.

    ``root``: the model that was validated: a job, a sweep, or the part of a job that stands ``at`` this field.
    """
    errors = error.errors(include_url=False)
    first = errors[0]
    path = _path(first["loc"])
    field = ".".join([at, *path] if at else path)
    if first["type"] == "extra_forbidden" and field in FORMER_NAMES:
        return UserError("has another name now", field=field, hint=f"it is called {FORMER_NAMES[field]}")
    if first["type"] == "extra_forbidden":
        fields = _fields_at(root, path[:-1], first["loc"])
        misspelt = unknown_name("field", path[-1], fields, field=field)
        return UserError("unknown field", field=field, hint=misspelt.hint)
    if first["type"] == "union_tag_invalid":
        return unknown_name("method", str(first["ctx"]["tag"]), METHODS, field="method.name")
    if first["type"] == "union_tag_not_found":
        return UserError("the method needs a name", field="method.name", hint=f"one of {', '.join(METHODS)}")
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, UserError):
        return raised
    here = [e for e in errors if _path(e["loc"]) == path]  # one for each type that the field may have
    rule = " or ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in here))
    value = first.get("input")
    shown = value if isinstance(value, (str, int, float, bool, list, type(None))) else type(value).__name__
    others = len(errors) - len(here)
    return UserError(rule, field=field or "JOB", value=shown, hint=f"and {others} more" if others else None)


def _path(loc: tuple[Any, ...]) -> list[str]:
    """An error's location as a path of the job file: without the method's tag and the types that pydantic tried."""
    path = [str(part) for part in loc]
    if path[:1] == ["method"] and len(path) > 1 and path[1] in METHODS:
        del path[1]
    return [part for i, part in enumerate(path) if i < 2 or not TRIED_TYPE.match(part)]


def _fields_at(root: type[Config], path: list[str], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields that there are at a path, beside the unknown one."""
    model: Any = root
    for part in path:
        if part == "method" and model is RunSpec:
            model = METHODS[str(loc[1])].Config
            continue
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def check_rules(spec: RunSpec) -> None:
    """Raises UserError if parts of the job file contradict each other."""
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
    _check_personal(spec)
    if spec.cost.model is not None:
        from fleetune.models.architectures import architecture

        architecture(spec.cost.model)  # raises UserError for an unknown name
    spec.method.check_job(spec)


def _check_personal(spec: RunSpec) -> None:
    """Raises UserError if clients are to be evaluated on examples that they do not hold out, or hold out some for nothing."""
    personal, held_out = spec.evaluation.personal, spec.data.held_out
    if personal != "none" and not held_out:
        raise UserError(
            "needs examples that clients hold out, and data.held_out is 0",
            field="evaluation.personal",
            value=personal,
            hint="set data.held_out, such as 0.2, or evaluation.personal to none",
        )
    if held_out and personal == "none":
        raise UserError(
            "takes examples away from training that nothing is evaluated on, as evaluation.personal is none",
            field="data.held_out",
            value=held_out,
            hint="set evaluation.personal to last or every, or data.held_out to 0",
        )
    if personal != "none" and spec.method.traits.pooled:
        raise UserError(
            f"is not possible for method {spec.method.name}: it has no clients, the server holds all examples",
            field="evaluation.personal",
            value=personal,
            hint="set evaluation.personal to none and data.held_out to 0, or use a federated method",
        )
