"""Commands that take a job or sweep file, or a run to continue: run, plan, resume and sweep.

Imports stand inside the commands, so that ``--help`` and mistakes in the arguments need neither PyTorch nor Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleetune.cli.options import Address, Assignments, Debug, JobFile, Json, RunDir, Workspace
from fleetune.cli.output import print_json, print_result, say
from fleetune.cli.stopping import saying_how_to_go_on
from fleetune.errors import printable


def run(
    job: JobFile,
    assignments: Assignments = None,
    address: Address = None,
    workspace: Workspace = Path(),
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Run one job, on this machine or on a Ray cluster."""
    from fleetune.engine.launch import cluster

    # Ray needs seconds to start, and so does the import of PyTorch below: they go on side by side.
    if not debug and (address is not None or cluster.names_ray(job, assignments or [])):
        cluster.join(address)
    from fleetune.spec import job_text, load, named_method, parse_overrides

    spec = load(job, parse_overrides(assignments or [], method=named_method(job)))
    meta = {"text": job_text(job, assignments or [])}
    from fleetune.cli.progress import make_progress
    from fleetune.engine.launch import run as launch

    with saying_how_to_go_on(), make_progress(spec.name) as progress:
        result = launch.run(
            spec, workspace=workspace, address=address, debug=debug, report=progress, warn=say, meta=meta
        )
    print_result(result, as_json)


def plan(
    job: JobFile,
    assignments: Assignments = None,
    compare: Annotated[
        str | None, typer.Option(metavar="METHODS", help="Compare these methods: fedit,devft,split-lora.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="a.b=1,2,4", help="Plan for each of these values. May be given several times."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write plan.parquet, rounds.parquet and figures to this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a job will cost each device, round by round. Nothing is trained, and the model's weights are not needed."""
    from fleetune.plan.variants import variants
    from fleetune.plan.walk import plan as make_plan

    plans = [
        make_plan(spec, label=label)
        for label, spec in variants(job, assignments or [], compare=compare, vary=vary or [])
    ]
    files: list[Path] = []
    if out is not None:
        from fleetune.plan.write import write

        files = write(plans, out)
    if as_json:
        from fleetune.plan.summary import document

        print_json({**document(plans), "files": [str(file) for file in files]})
        return
    from fleetune.plan.show import show

    show(plans)
    for file in files:
        print(file)


def resume(
    run_dir: RunDir,
    address: Address = None,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Continue a run after its last finished round."""
    from fleetune.cli.progress import make_progress
    from fleetune.engine.launch import run as launch

    with saying_how_to_go_on(), make_progress(run_dir.name) as progress:
        result = launch.resume(run_dir, address=address, debug=debug, report=progress, warn=say)
    print_result(result, as_json)


def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep file: a base job and the fields to vary.")
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="a.b=c", help="Override a field of the base job. May be given several times."
        ),
    ] = None,
    address: Address = None,
    workspace: Workspace = Path(),
    as_json: Json = False,
) -> int:
    """Run a grid or a search of jobs on Ray Tune. Launched again, it runs only what is missing."""
    from fleetune.spec import job_text, parse_overrides
    from fleetune.sweep.config import load

    spec = load(file, parse_overrides(assignments or []))
    text = job_text(file, assignments or [])
    from fleetune.sweep import launch
    from fleetune.sweep.progress import make_progress

    with saying_how_to_go_on(), make_progress(spec) as progress:
        result = launch.run(spec, workspace=workspace, address=address, text=text, report=progress, warn=say)
    if as_json:
        print_json(result.to_dict())
    else:
        print(printable("\n".join(result.lines())))
    return 1 if result.failures else 0
