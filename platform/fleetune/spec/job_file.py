"""The job file: YAML in, a checked spec out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fleetune.errors import UserError, nearest
from fleetune.methods import METHODS
from fleetune.methods.find import find_method, installed_methods, look_in
from fleetune.redaction import redacted
from fleetune.spec.run_spec import RunSpec
from fleetune.spec.validation import as_user_error, check_rules
from fleetune.spec.values import apply_overrides
from fleetune.yaml_text import NOT_YAML
from fleetune.yaml_text import load as load_yaml


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """The spec in a job file, with overrides like ``{"method.growth_rate": 4}``. Checks all that needs no model and no data.

    A method from outside may lie in the job file's folder.
    """
    look_in(Path(path).parent)
    return from_dict(read_yaml(path), overrides)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if there is no file, no YAML in it, or no mapping."""
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


def named_method(path: str | Path) -> str | None:
    """The method that a job file names, before anything is checked. From here on it may lie in the file's folder."""
    look_in(Path(path).parent)
    method = read_yaml(path).get("method")
    name = method.get("name") if isinstance(method, dict) else None
    return name if isinstance(name, str) else None


def job_text(path: str | Path, assignments: list[str]) -> str:
    """A job or sweep file as it was launched: its text without passwords, and each ``--set`` as a comment."""
    lines = [Path(path).read_text(encoding="utf-8").rstrip(), *(f"# --set {each}" for each in assignments)]
    return redacted("\n".join(lines))


def from_dict(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """The spec in plain data, with overrides. Raises UserError for the first mistake."""
    merged = apply_overrides(values, overrides or {})
    merged["method"] = _checked_outside(merged.get("method", {"name": "fedit"}))
    try:
        spec = RunSpec.model_validate(merged)
    except ValidationError as error:
        raise as_user_error(error, RunSpec) from None
    check_rules(spec)
    return spec


def _checked_outside(settings: Any) -> Any:
    """The settings of a method from outside, checked by its own class; all others as they are, for `RunSpec` to check."""
    name = settings.get("name") if isinstance(settings, dict) else None
    if not isinstance(name, str) or name in METHODS:
        return settings
    config = find_method(name).Config
    try:
        return config.model_validate(settings)
    except ValidationError as error:
        raise as_user_error(error, config, at="method") from None


def json_schema() -> dict[str, Any]:
    """The job file's JSON schema, for editors and for the reference page, with the methods that are installed here."""
    schema = RunSpec.model_json_schema()
    for name in installed_methods():
        with contextlib.suppress(UserError):  # a package that is broken is a matter of `fleetune list methods`
            _add_installed(schema, name)
    return schema


def _add_installed(schema: dict[str, Any], name: str) -> None:
    """Add the settings of a method that an installed package offers to the job file's schema."""
    own = find_method(name).Config.model_json_schema()
    schema["$defs"] |= own.pop("$defs", {})
    own["properties"]["name"] = {"const": name, "type": "string"}
    schema["$defs"][f"method {name}"] = {**own, "required": sorted({*own.get("required", ()), "name"})}
    schema["properties"]["method"]["oneOf"].append({"$ref": f"#/$defs/method {name}"})
