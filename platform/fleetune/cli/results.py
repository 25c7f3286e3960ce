"""Commands for runs and sweeps that are there already: sync, report and ui."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fleetune.cli.options import Json, Workspace
from fleetune.cli.output import print_json, say


def sync(
    run_dir: Annotated[
        Path,
        typer.Argument(metavar="RUN_DIR|SWEEP_DIR", help="A run directory, or a sweep directory: sweeps/<sweep_id>."),
    ],
    uri: Annotated[str | None, typer.Option(help="The MLflow store. Default: the one that the job names.")] = None,
    as_json: Json = False,
) -> None:
    """Send the records of a run, or of a sweep and its trials, to MLflow. What is there already is not sent again."""
    from fleetune.tracking.sync import sync as sync_run

    sent = sync_run(run_dir, uri=uri)
    if as_json:
        print_json(vars(sent))
    else:
        say(f"{sent.uri}: sent {sent.num_metrics} metrics, {sent.num_params} params, {sent.num_artifacts} artifacts")
        for link in sent.left_out:
            say(f"{link} is a link to a file outside of the run directory: not sent")


def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR…|SWEEP_DIR", help="Run directories, or one sweep directory.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for report.html. Default: report/, or the sweep directory."),
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", help="For a sweep: show the quality within 10MB, 2h or 5kJ. May be given several times."
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", help="For a sweep: show the cost to reach 0.6 or 60%. May be given several times."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file with the learning curves, costs and timelines of runs, or with the results of a sweep."""
    from fleetune.reports.run_report import report as write_report

    path = write_report(paths, out, budgets=budgets or (), targets=targets or ())
    if as_json:
        print_json({"report": str(path), **_claims(paths)})
    else:
        print(path)


def _claims(paths: list[Path]) -> dict[str, Any]:
    """The verdicts on a sweep's claims; nothing for runs, and for a sweep without claims."""
    from fleetune.claims.verdicts import as_dicts, verdicts_of
    from fleetune.records.sweep_directory import SweepDirectory

    if not (paths[0] / SweepDirectory.SPEC).is_file():
        return {}
    verdicts = verdicts_of(SweepDirectory.open(paths[0]))
    return {"claims": as_dicts(verdicts)} if verdicts else {}


def ui(
    workspace: Workspace = Path(),
    port: Annotated[int, typer.Option(help="Port of the UI on this machine.")] = 5000,
) -> None:
    """Open the MLflow UI on the workspace's store."""
    from fleetune.tracking.ui import open_ui

    open_ui(workspace, port)
