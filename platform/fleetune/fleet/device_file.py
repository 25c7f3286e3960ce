"""Reading files of devices and links: fleetune's own and those of a job (``fleet.device_files``), checked by one rule.

fleetune's own are devices.yaml and networks.yaml beside this module; `fleet.device_entries` says what an entry holds.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fleetune.errors import UserError, nearest, unknown_name
from fleetune.fleet.device_entries import DeviceFile
from fleetune.fleet.links import NetworkProfile
from fleetune.fleet.profile import DeviceProfile

FIELD = "fleet.device_files"
BUILT_IN = ("devices.yaml", "networks.yaml")


@dataclass(frozen=True)
class Catalogue:
    """Devices and links by name."""

    devices: dict[str, DeviceProfile]
    networks: dict[str, NetworkProfile]

    def device(self, name: str, *, field: str = "fleet.devices") -> DeviceProfile:
        """The device of that name, or one of its power modes (``name@mode``). Raises UserError if there is none."""
        base, _, mode = name.partition("@")
        if base not in self.devices:
            raise unknown_name("device", name, self.devices, field=field)
        return self.devices[base].in_mode(mode) if mode else self.devices[base]

    def network(self, name: str, *, field: str = "fleet.network") -> NetworkProfile:
        """The link of that name. Raises UserError with the nearest name if there is none."""
        if name not in self.networks:
            raise unknown_name("network", name, self.networks, field=field)
        return self.networks[name]


@functools.cache
def built_in() -> Catalogue:
    """The devices and links that ship with fleetune."""
    return _joined(Catalogue({}, {}), [str(Path(__file__).with_name(name)) for name in BUILT_IN])


def catalogue(files: Sequence[str]) -> Catalogue:
    """The devices and links that ship with fleetune and those of these files. Raises UserError: file, entry, field and rule."""
    return _joined(built_in(), files) if files else built_in()


def _joined(first: Catalogue, files: Sequence[str]) -> Catalogue:
    """A catalogue and the entries of files. No file may replace an entry: a name would then mean two things."""
    devices, networks = dict(first.devices), dict(first.networks)
    for path in files:
        found = read(path)
        for kind, entries, into in (("devices", found.devices, devices), ("networks", found.networks, networks)):
            for name in entries:
                if name in into:
                    raise UserError(f"{path}, {kind}.{name}: there is one of this name already", field=FIELD, value=name,
                                    hint="give it another name")  # fmt: skip
        devices |= {name: entry.profile(name) for name, entry in found.devices.items()}
        networks |= {name: entry.profile(name) for name, entry in found.networks.items()}
    return Catalogue(devices, networks)


def read(path: str) -> DeviceFile:
    """Read and check a file of devices and links. Raises UserError if it cannot be read or breaks a rule."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the device file cannot be read: {error}", field=FIELD, value=path) from None
    try:
        values = yaml.load(text, Loader=_Loader)  # a safe loader: PyYAML's own in C, where it is there
        return DeviceFile.model_validate({} if values is None else values)
    except ValidationError as error:
        raise _user_error(path, error) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}", field=FIELD, value=path) from None


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """A safe loader for which a name that stands twice in one mapping is an error; PyYAML alone would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ValueError(f"line {line}: {key.value!r} stands twice, first in line {seen[key.value]}")
            seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


def _user_error(path: str, error: ValidationError) -> UserError:
    """The first fault that pydantic found, with the file, the place in it and a hint."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"] if part != "[key]"]
    rule, hint = first["msg"].removeprefix("Value error, "), None
    if first["type"] == "extra_forbidden":
        known = _fields_at(where[:-1])
        guess = nearest(where[-1], known)
        rule = "unknown field"
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}"
    elif first["loc"][-1:] == ("[key]",):
        rule = "a name has small letters, digits, '.', '_' and '-'"
    value = first.get("input")
    shown = value if isinstance(value, (str, int, float)) and first["type"] != "missing" else path
    return UserError(
        f"{path}, {'.'.join(where)}: {rule}" if where else f"{path}: {rule}", field=FIELD, value=shown, hint=hint
    )


def _fields_at(where: Sequence[str]) -> list[str]:
    """The fields that are allowed at a place in a file, such as ``["devices", "my-board", "memory"]``."""
    model: Any = DeviceFile
    for part in where:
        fields: Mapping[str, Any] = getattr(model, "model_fields", {})
        if part not in fields:  # the name of an entry
            continue
        kinds = (fields[part].annotation, *getattr(fields[part].annotation, "__args__", ()))
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), model)
    return list(model.model_fields)
