"""Methods that another one wraps: which there are, their settings in the job file, and how their tensors are found by block.

A wrapper (DevFT) holds another method and calls its hooks. What the wrapped one is set to stands in ``method.inner``, is checked
by that method's own settings, and mistakes are told with their place there.

FLoRA is not among them. Its clients hold the sum of all stacks, so at a change of stage every client must come to hold what the
new submodel's blocks are made of. Stacks of an earlier stage have as many blocks as that one had, and a client that merged blocks
to fit its budget holds but the sum of what it merged. What such a client lacks, and so what it is to be charged, is not certain.
ProgFed has stages of its own, and SplitLoRA's cut would have to move with the stages.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from fleetune.errors import UserError, unknown_name
from fleetune.methods.base import Method, MethodConfig
from fleetune.methods.dofit import DoFIT
from fleetune.methods.fedavg import FedAvg, FedIT
from fleetune.methods.fedprox import FedProx
from fleetune.methods.fedsa_lora import FedSALoRA

INNER: dict[str, type[Method]] = {
    "dofit": DoFIT,
    "fedavg": FedAvg,
    "fedit": FedIT,
    "fedprox": FedProx,
    "fedsa-lora": FedSALoRA,
}
FIELD = "method.inner"

_PREFIXED = re.compile(r"(?P<before>.+\.)(?P<block>layers\.\d+\.)(?P<rest>.+)")
_MARK = "|"  # stands between what was before the block and the rest; no name of ours holds it


def inner_settings(name: str, values: Mapping[str, Any]) -> MethodConfig:
    """The settings of a wrapped method. Raises UserError, with the field under ``method.inner``, for the first mistake."""
    config = INNER[name].Config
    if "name" in values:
        raise UserError(
            "is given by method.aggregation", field=f"{FIELD}.name", value=values["name"], hint="leave it out"
        )
    try:
        return config.model_validate({**values, "name": name})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join([FIELD, *path])
    if first["type"] == "extra_forbidden":
        known = [each for each in config.model_fields if each != "name"]
        hint = unknown_name("field", path[-1], known, field=field).hint if known else f"{name} has no settings"
        raise UserError(f"no field of {name}", field=field, hint=hint)
    value = first.get("input")
    shown = value if isinstance(value, (str, int, float, bool, list, type(None))) else type(value).__name__
    raise UserError(first["msg"].removeprefix("Value error, "), field=field, value=shown)


@contextlib.contextmanager
def inner_fields() -> Iterator[None]:
    """A wrapped method's checks know their fields as ``method.<field>``; here they are ``method.inner.<field>``."""
    try:
        yield
    except UserError as error:
        if not (error.field or "").startswith("method."):
            raise
        field = f"{FIELD}.{str(error.field).removeprefix('method.')}"
        raise UserError(error.rule, field=field, value=error.value, hint=error.hint) from None


def block_first(name: str) -> str:
    """A tensor's name that begins with its block, so that blocks can be grouped and fused whatever stands before them.

    ``domain.0.layers.3.mlp.up_proj.lora_A`` -> ``layers.3.domain.0.|mlp.up_proj.lora_A``; a name that begins with its block
    stays as it is.
    """
    found = _PREFIXED.fullmatch(name)
    return f"{found['block']}{found['before']}{_MARK}{found['rest']}" if found else name


def own_name(name: str) -> str:
    """The name that `block_first` was given."""
    if _MARK not in name:
        return name
    head, _, rest = name.partition(_MARK)
    layers, block, before = head.split(".", 2)
    return f"{before}{layers}.{block}.{rest}"
