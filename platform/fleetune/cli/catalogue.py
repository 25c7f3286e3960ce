"""The commands list and schema: what a job file can name, one row each with its source, and the fields it has."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from fleetune.cli.options import Json
from fleetune.cli.output import print_json
from fleetune.errors import UserError, unknown_name


def methods() -> list[dict[str, Any]]:
    """All methods: the built-in ones, and those that installed packages offer."""
    from fleetune.methods import METHODS
    from fleetune.methods.find import find_method, installed_methods

    rows = [{"name": name, "about": method.source} for name, method in METHODS.items()]
    for name, point in installed_methods().items():
        try:
            about = f"{find_method(name).source} [{point.value}]"
        except UserError as error:
            about = f"cannot be used: {error.rule} [{point.value}]"
        rows.append({"name": name, "about": about})
    return rows


def devices() -> list[dict[str, Any]]:
    """All devices with their power modes."""
    from fleetune.fleet.devices import DEVICES

    return [
        {
            "name": name,
            "fp32_tflops": round(d.fp32_flops / 1e12, 3),
            "fp16_tflops": round(d.fp16_flops / 1e12, 2),
            "budget_gb": round(d.budget_bytes / 1e9, 2),
            "gb_per_second": round(d.bandwidth_bytes_per_second / 1e9, 1),
            "bf16": "yes" if d.bf16 == "native" else f"as {d.bf16}",
            "watts": d.active_watts,
            "modes": " ".join(f"@{mode}" for mode, _ in d.modes),
            "source": dict(d.sources).get("compute", ""),
        }
        for name, d in DEVICES.items()
    ]


def networks() -> list[dict[str, Any]]:
    """All links."""
    from fleetune.fleet.networks import NETWORKS

    return [
        {
            "name": name,
            "down_mbps": round(n.down_bps / 1e6, 1),
            "up_mbps": round(n.up_bps / 1e6, 1),
            "latency_ms": round(n.latency_seconds * 1e3, 1),
            "source": getattr(n, "source", ""),
        }
        for name, n in NETWORKS.items()
    ]


def models() -> list[dict[str, Any]]:
    """Base models that ship with the package, and architectures that can be costed."""
    from fleetune.models.architectures import ARCHITECTURES
    from fleetune.models.folder import BUILT_IN

    out = [{"name": name, "use": "model.base", "about": about} for name, about in BUILT_IN.items()]
    for name, shape in ARCHITECTURES.items():
        about = f"{shape.num_params() / 1e9:.2f} G parameters, {shape.num_layers} blocks; {shape.source}"
        out.append({"name": name, "use": "cost.model", "about": about})
    return out


def datasets() -> list[dict[str, Any]]:
    """Data that ships with the package."""
    from fleetune.data.sources import DATASETS

    return [{"name": name, "about": about} for name, about in DATASETS.items()]


CATALOGUES = {"methods": methods, "devices": devices, "networks": networks, "models": models, "datasets": datasets}


def list_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="methods, devices, networks, models or datasets.")],
    as_json: Json = False,
) -> None:
    """List the methods, devices, networks, models or datasets that a job can name, with their sources."""
    if kind not in CATALOGUES:
        raise unknown_name("list", kind, CATALOGUES, field="KIND")
    rows = CATALOGUES[kind]()
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def schema(
    sweep: Annotated[bool, typer.Option("--sweep", help="The schema of sweep files instead.")] = False,
) -> None:
    """Print the JSON schema of job files, for completion in editors."""
    from fleetune.spec import json_schema
    from fleetune.sweep.config import SweepSpec

    print(json.dumps(SweepSpec.model_json_schema() if sweep else json_schema(), indent=2))
