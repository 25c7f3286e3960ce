"""Commands for runs and sweeps that are there already: sync, report and ui."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fleetune.cli.options import Json, Workspace
from fleetune.cli.output import print_json, say
from fleetune.errors import UserError, printable


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
    as_markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="For a sweep: print its comparison and verdicts as Markdown instead of writing the page."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write one HTML file with the learning curves, costs and timelines of runs, or with the results of a sweep."""
    if as_markdown:
        _print_markdown(paths, targets or [], as_json, has_page_options=bool(out or budgets))
        return
    from fleetune.reports.run_report import report as write_report

    path = write_report(paths, out, budgets=budgets or (), targets=targets or ())
    if as_json:
        print_json({"report": str(path), **_of_sweep(paths, targets or [])})
    else:
        print(path)


def _print_markdown(paths: list[Path], targets: list[str], as_json: bool, *, has_page_options: bool) -> None:
    """The comparison and the verdicts of one sweep on stdout. Raises UserError for runs, and for options of the page."""
    if as_json or has_page_options:
        rule = "goes with --target alone: it writes no page, and --json has the same numbers"
        raise UserError(rule, field="--markdown", hint="leave the other options out")
    if len(paths) != 1 or not _is_sweep(paths):
        rule = "only a sweep has configurations to compare"
        value = ", ".join(map(str, paths))
        raise UserError(rule, field="--markdown", value=value, hint="give one sweep directory: sweeps/<name>-<id>")
    from fleetune.reports.sweep_report import sweep_markdown

    print(printable(sweep_markdown(paths[0], targets=targets)))


def _of_sweep(paths: list[Path], targets: list[str]) -> dict[str, Any]:
    """A sweep's comparison, and the verdicts on its claims if it has some; nothing for runs."""
    if not _is_sweep(paths):
        return {}
    from fleetune.claims.verdicts import as_dicts, verdicts_of
    from fleetune.records.sweep_directory import SweepDirectory
    from fleetune.reports.sweep_report import sweep_comparison

    verdicts = verdicts_of(SweepDirectory.open(paths[0]))
    comparison = sweep_comparison(paths[0], targets=targets).to_dict()
    return {"comparison": comparison, **({"claims": as_dicts(verdicts)} if verdicts else {})}


def _is_sweep(paths: list[Path]) -> bool:
    from fleetune.records.sweep_directory import SweepDirectory

    return (paths[0] / SweepDirectory.SPEC).is_file()


def ui(
    workspace: Workspace = Path(),
    port: Annotated[int, typer.Option(help="Port of the UI on this machine.")] = 5000,
) -> None:
    """Open the MLflow UI on the workspace's store."""
    from fleetune.tracking.ui import open_ui

    open_ui(workspace, port)
