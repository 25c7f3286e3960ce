"""The command ``submit``: a job or sweep file runs on a Ray cluster, from any machine that reaches its job server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fleetune.cli.options import Assignments, Json
from fleetune.cli.output import complain, print_json, say
from fleetune.cli.stopping import STOPPED


def submit(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A job or sweep file inside the current folder, which is sent to the cluster."
        ),
    ],
    address: Annotated[str, typer.Option("--address", help="The cluster's job server: http://HEAD:8265.")],
    assignments: Assignments = None,
    workspace: Annotated[
        str | None,
        typer.Option("--workspace", "-w", help="Workspace on the cluster. Default: ~/fleetune there."),
    ] = None,
    variables: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="Pass on an environment variable. May be given several times."),
    ] = None,
    installed: Annotated[
        bool,
        typer.Option(
            "--installed", help="Run the fleetune that is installed on the cluster, instead of sending this one."
        ),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job and end with its exit status, or return at once.")
    ] = True,
    as_json: Json = False,
) -> int:
    """Run a job or a sweep on a Ray cluster, from any machine that reaches its job server."""
    from fleetune.cli import job_server

    job = job_server.submit(
        file,
        address=address,
        assignments=assignments or [],
        workspace=workspace,
        variables=variables or [],
        installed=installed,
        as_json=as_json,
    )
    say(f"{job.job_id} is submitted to {address}; {job.how_to_follow}")
    document: dict[str, Any] = {"job_id": job.job_id, "address": address, "status": "submitted"}
    status = 0
    if wait:
        try:
            status = job_server.follow(
                job, lambda text: print(text, end="", file=sys.stderr if as_json else None, flush=True)
            )
        except KeyboardInterrupt:
            raise SystemExit(
                complain(
                    f"{job.job_id} goes on; {job.how_to_follow}", {**document, "status": "detached"}, status=STOPPED
                )
            ) from None
        outcome = {"status": "failed" if status else "succeeded", "exit_status": status}
        document = {**document, **outcome, "result": job_server.result_of(job)} if as_json else document
    if as_json:
        print_json(document)
    return status
