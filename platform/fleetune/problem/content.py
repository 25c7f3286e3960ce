"""Digests of all that a run reads from outside. With the spec's hash they are the run's identity.

A part is named by the field that names it, a model's files by field and file: ``data.dataset``, ``data.eval_dataset``,
``model.base/model.safetensors``, ``model.base/tokenizer.json``, ``fleet.availability.path``, ``fleet.device_files/my.yaml``;
a file with the code of a method from outside is ``method.name/my_module.py``, one that a method reads ``method.adapters/…``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fleetune.data.sources import read_content
from fleetune.digests import digest_of, file_digest
from fleetune.errors import UserError
from fleetune.fleet.fleet import FleetConfig
from fleetune.methods.find import code_of, find_method
from fleetune.models.load import base_content
from fleetune.spec import RunSpec

Content = dict[str, str]
"""Part, named as above -> digest of its content."""
# Fields of a spec's data that decide how much of them is used, and by which client, but not which files are read.
NOT_READ: Any = {
    "partition": {"alpha", "shards_per_client", "min_examples"},
    "max_tokens": True,
    "held_out": True,
    "eval_fraction": True,
}


def identity(spec: RunSpec, content: Mapping[str, str]) -> str:
    """A hash of the spec and of all that is read, 16 hexadecimal digits. Runs of one identity have the same results."""
    return digest_of([spec.spec_hash, *(part for pair in sorted(content.items()) for part in pair)])[:16]


def model_content(files: Mapping[str, str]) -> Content:
    """The parts of a model's files, from name -> digest."""
    return {f"model.base/{name}": digest for name, digest in files.items()}


def fleet_content(fleet: FleetConfig) -> Content:
    """The parts of a fleet: the availability trace and the device files that the job names."""
    files = {f"fleet.device_files/{name}": Path(name) for name in fleet.outside_device_files()}
    if fleet.availability.path is not None:
        files["fleet.availability.path"] = Path(fleet.availability.path).expanduser()
    content: Content = {}
    for part, path in files.items():
        with contextlib.suppress(OSError):  # the code that reads the file itself has the better message
            content[part] = file_digest(path)
    return content


def code_content(spec: RunSpec) -> Content:
    """The parts of a method from outside: the files that it is written in. None for a built-in one."""
    return {f"method.name/{name}": digest for name, digest in code_of(find_method(spec.method.name)).items()}


def check_devices(fleet: FleetConfig, content: Mapping[str, str]) -> None:
    """Raises UserError if a file of devices is no longer the one that ``content`` notes.

    They are read again with each fleet that is built, so they may change after the run has noted them.
    """
    for name in fleet.outside_device_files():
        noted = content.get(f"fleet.device_files/{name}")
        if noted is not None and noted != file_digest(Path(name)):
            raise UserError("was changed while it was read", field="fleet.device_files", value=name, hint="try again")


class Contents:
    """The content that jobs would read now. Jobs that read the same, as a sweep's trials do, share one reading."""

    def __init__(self) -> None:
        self._cache: dict[str, Content] = {}

    def of(self, spec: RunSpec) -> Content:
        """The content that this job would read. Raises UserError if some of it is not there any more."""
        data, model = spec.data, spec.model.base
        return {
            **self._once(f"data {data.model_dump_json(exclude=NOT_READ)}", lambda: read_content(data)),
            **self._once(f"model {model}", lambda: model_content(base_content(model))),
            **fleet_content(spec.fleet),
            **code_content(spec),
            **spec.method.content(),
        }

    def _once(self, key: str, read: Callable[[], Content]) -> Content:
        if key not in self._cache:
            self._cache[key] = read()
        return self._cache[key]


def check_content(spec: RunSpec, recorded: Any, content: Mapping[str, str], *, run: str) -> None:
    """Raises UserError if a run would go on with other content than it was started with, its ``recorded`` one."""
    if not isinstance(recorded, dict):
        raise UserError(
            "was started by an earlier version of fleetune, which did not note what it read: "
            "whether data and model are still the same cannot be known",
            field="RUN_DIR",
            value=run,
            hint="start a new run from the job file",
        )
    changed = sorted(part for part in {*recorded, *content} if recorded.get(part) != content.get(part))
    if not changed:
        return
    field, _, file = changed[0].partition("/")
    subject = f"its {file}" if file else "its content"
    change = "is new" if changed[0] not in recorded else "is gone" if changed[0] not in content else "has changed"
    others = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
    raise UserError(
        f"{subject} {change} since the run was started{others}",
        field=field,
        value=_value(spec, field),
        hint="restore it and resume again, or start a new run from the job file",
    )


def _value(spec: RunSpec, field: str) -> Any:
    value: Any = spec
    for name in field.split("."):
        value = getattr(value, name, None)
    return value
