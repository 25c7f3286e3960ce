"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Workspace = Annotated[
    Path,
    typer.Option(
        "--workspace",
        "-w",
        envvar="FLEETUNE_WORKSPACE",
        help="Folder that holds runs/, sweeps/ and the local MLflow store.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Join a running Ray cluster: auto, or HOST:PORT. Default: start Ray on this machine."
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Run serially in this process, so that breakpoints work. The results are the same."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="a.b=c", help="Override a field of the job. May be given several times."),
]
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory: runs/<run_id>.")]
