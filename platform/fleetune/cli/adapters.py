"""The commands of a library of adapters: ``fleetune adapters train``, ``list`` and ``show``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fleetune.cli.options import Address, Assignments, Debug, Json, Workspace
from fleetune.cli.output import print_json, print_result, say
from fleetune.cli.stopping import saying_how_to_go_on
from fleetune.errors import printable

adapters = typer.Typer(help="A library of adapters that jobs compose: train them, list them, show one.")


@adapters.command()
def train(
    job: Annotated[
        Path,
        typer.Argument(metavar="JOB.yaml|RUN_DIR", help="The job that trains the adapter, or a run that has done so."),
    ],
    library: Annotated[Path, typer.Option("--library", "-l", help="The library: a folder of adapters.")],
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="The adapter's name in it. Default: that of the job.")
    ] = None,
    assignments: Assignments = None,
    address: Address = None,
    workspace: Workspace = Path(),
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Run a job, and store its adapter in PEFT's format with what it can do. A stopped run is resumed, then named here."""
    from fleetune.engine.launch import run as launch
    from fleetune.engine.launch import skills
    from fleetune.records.run_directory import RunDirectory

    if job.is_dir():
        run_dir, result = RunDirectory.open(job), None
        folder = skills.check_place(library, run_dir.spec["name"] if name is None else name)
    else:
        from fleetune.cli.progress import make_progress
        from fleetune.spec import job_text, load, named_method, parse_overrides

        spec = load(job, parse_overrides(assignments or [], method=named_method(job)))
        folder = skills.check_place(library, spec.name if name is None else name)
        meta = {"text": job_text(job, assignments or [])}
        how: dict[str, Any] = {"workspace": workspace, "address": address, "debug": debug, "meta": meta, "warn": say}
        with saying_how_to_go_on(), make_progress(spec.name) as progress:
            result = launch.run(spec, report=progress, admits=skills.check_pairs, **how)
        run_dir = RunDirectory.open(result.run_dir)
    facts = skills.store(run_dir, folder)
    if as_json:
        print_json({"name": folder.name, **facts, "folder": str(folder), "run_dir": str(run_dir.path)})
        return
    if result is not None:
        print_result(result, as_json=False)
    print(printable(f"adapter    {folder}"))


Folders = Annotated[
    list[str],
    typer.Argument(metavar="FOLDER…", help="Libraries, folders of adapters or of runs, or hub ids."),
]


@adapters.command("list")
def list_(folders: Folders, as_json: Json = False) -> None:
    """List adapters: what each can do, its base, rank and quality, or why it cannot be used."""
    from fleetune.models.skill_file import library_rows

    rows = library_rows(folders)
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    shown = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    table = Table(*shown, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in shown))
    Console(width=None if sys.stdout.isatty() else 250).print(table)


@adapters.command()
def show(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="An adapter's folder, a run's folder, or a hub id.")],
    as_json: Json = False,
) -> None:
    """Show all that is known of one adapter: its matrices and their ranks, its data and quality, its files."""
    from fleetune.models.skill_file import adapter_details

    details = adapter_details(folder)
    if as_json:
        print_json(details)
        return
    width = max(map(len, details))
    for name, value in details.items():
        print(printable(f"{name:<{width}}  {_cell(value)}"))


def _cell(value: Any) -> str:
    """A value as text: numbers of four digits, lists and tables in one line, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
