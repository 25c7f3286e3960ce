"""The command line. Progress and messages go to stderr; with ``--json`` the last line of stdout is one JSON document."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fleetune.errors import RunFailed, Stopped, UserError, printable, unknown_name
from fleetune.files import NO_ROOM, WriteFailed
from fleetune.redaction import redacted

app = typer.Typer(
    help="Simulate federated fine-tuning of language models on many small devices, and what it costs each of them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STOPPED = 130
"""Exit status of a command that Ctrl-C or SIGTERM ended."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Workspace = Annotated[
    Path,
    typer.Option("--workspace", "-w", envvar="FLEETUNE_WORKSPACE", help="Where runs/ and the MLflow store lie."),
]
Address = Annotated[
    str | None, typer.Option("--address", help="A running Ray cluster: auto, or HOST:PORT; default: this machine.")
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Run serially in this process, so that breakpoints work; the same results.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="a.b=c", help="Override a field; may be given often.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory, runs/<run_id>.")]


@app.command()
def run(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    assignments: Assignments = None,
    address: Address = None,
    workspace: Workspace = Path(),
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Run one job, on this machine or on a Ray cluster."""
    from fleetune.engine.launch import cluster

    if not debug and (address is not None or cluster.names_ray(job, assignments or [])):
        cluster.join(address)
    from fleetune.spec import job_text, load, parse_overrides

    spec = load(job, parse_overrides(assignments or []))
    meta = {"text": job_text(job, assignments or [])}
    from fleetune.engine.launch import run as launch
    from fleetune.progress import make_progress

    with _told_how_to_go_on(), make_progress(spec.name) as progress:
        result = launch.run(
            spec, workspace=workspace, address=address, debug=debug, report=progress, warn=_say, meta=meta
        )
    _show_result(result, as_json)


@app.command()
def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    assignments: Assignments = None,
    compare: Annotated[
        str | None, typer.Option(metavar="METHODS", help="Methods to put side by side: fedit,devft,split-lora.")
    ] = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="a.b=1,2,4", help="Plan for each of these values; may be given often.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for plan.parquet, rounds.parquet and the figures.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a job will cost each device, round by round, without training and without the model's weights."""
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

        _print_json({**document(plans), "files": [str(file) for file in files]})
        return
    from fleetune.plan.show import show

    show(plans)
    for file in files:
        print(file)


@app.command()
def resume(
    run_dir: RunDir,
    address: Address = None,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Go on with a run after its last finished round."""
    from fleetune.engine.launch import run as launch
    from fleetune.progress import make_progress

    with _told_how_to_go_on(), make_progress(run_dir.name) as progress:
        result = launch.resume(run_dir, address=address, debug=debug, report=progress, warn=_say)
    _show_result(result, as_json)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep file: a base job and what is varied.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="a.b=c", help="Override a field of the base job.")
    ] = None,
    address: Address = None,
    workspace: Workspace = Path(),
    as_json: Json = False,
) -> int:
    """Run a grid or a search on Ray Tune; launched again, it runs what is missing."""
    from fleetune.spec import job_text, parse_overrides
    from fleetune.sweep.config import load

    spec = load(file, parse_overrides(assignments or []))
    text = job_text(file, assignments or [])
    from fleetune.sweep import launch
    from fleetune.sweep.progress import make_progress

    with _told_how_to_go_on(), make_progress(spec) as progress:
        result = launch.run(spec, workspace=workspace, address=address, text=text, report=progress, warn=_say)
    if as_json:
        _print_json(result.to_dict())
    else:
        print(printable("\n".join(result.lines())))
    return 1 if result.failures else 0


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job or sweep file inside the current folder.")],
    address: Annotated[str, typer.Option("--address", help="The cluster's job server, http://HEAD:8265.")],
    assignments: Assignments = None,
    workspace: Annotated[
        str | None,
        typer.Option("--workspace", "-w", help="Folder on the cluster for runs/; default: ~/fleetune there."),
    ] = None,
    variables: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="Hand on an environment variable; may be given often."),
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run the cluster's own fleetune, not the code that is here.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job, and end with its exit status.")
    ] = True,
    as_json: Json = False,
) -> int:
    """Run a job or a sweep on a Ray cluster, from any machine that reaches its job server."""
    from fleetune import submit as jobs

    job = jobs.submit(
        file,
        address=address,
        assignments=assignments or [],
        workspace=workspace,
        variables=variables or [],
        installed=installed,
        as_json=as_json,
    )
    _say(f"{job.job_id} is submitted to {address}; {job.how_to_follow}")
    document: dict[str, Any] = {"job_id": job.job_id, "address": address, "status": "submitted"}
    status = 0
    if wait:
        try:
            status = jobs.follow(
                job, lambda text: print(text, end="", file=sys.stderr if as_json else None, flush=True)
            )
        except KeyboardInterrupt:
            raise SystemExit(
                _complain(
                    f"{job.job_id} goes on; {job.how_to_follow}", {**document, "status": "detached"}, status=STOPPED
                )
            ) from None
        outcome = {"status": "failed" if status else "succeeded", "exit_status": status}
        document = {**document, **outcome, "result": jobs.result_of(job)} if as_json else document
    if as_json:
        _print_json(document)
    return status


@app.command()
def sync(
    run_dir: RunDir,
    uri: Annotated[str | None, typer.Option(help="MLflow store; default: the run's own.")] = None,
    as_json: Json = False,
) -> None:
    """Send a run's records, or those of a sweep and its trials, to MLflow, exactly once."""
    from fleetune.tracking.sync import sync as sync_run

    sent = sync_run(run_dir, uri=uri)
    if as_json:
        _print_json(vars(sent))
    else:
        _say(f"{sent.uri}: sent {sent.num_metrics} metrics, {sent.num_params} params, {sent.num_artifacts} artifacts")
        for link in sent.left_out:
            _say(f"{link} is a link that leads out of the run's directory: not sent")


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN_DIR…|SWEEP_DIR", help="Run directories, or a sweep's.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.html; default: report/, or the sweep's own.")
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option("--budget", help="Of a sweep: quality within 10MB, 2h or 5kJ; may be given often."),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="Of a sweep: cost to reach 0.6 or 60%; may be given often.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Learning curves, costs and timelines of runs, or what came out of a sweep: one HTML file with its figures."""
    from fleetune.reports.run_report import report as write_report

    path = write_report(paths, out, budgets=budgets or (), targets=targets or ())
    if as_json:
        _print_json({"report": str(path)})
    else:
        print(path)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="methods, devices, networks, models or datasets.")],
    as_json: Json = False,
) -> None:
    """What exists: methods, devices, networks, models or datasets."""
    from fleetune.catalogue import CATALOGUES

    if kind not in CATALOGUES:
        raise unknown_name("list", kind, CATALOGUES, field="KIND")
    rows = CATALOGUES[kind]()
    if as_json:
        _print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
def ui(
    workspace: Workspace = Path(),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Open the MLflow UI on this workspace's store."""
    from fleetune.tracking.ui import open_ui

    open_ui(workspace, port)


@app.command()
def schema() -> None:
    """Print the job file's JSON schema, for editors."""
    from fleetune.spec import json_schema

    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """Entry point: exit status 0 success, 1 a failed run, 2 the user's mistake."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault(
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1"
    )  # Ray's own would answer SIGTERM with a stack of its calls
    with _stopped_once():
        try:
            status: Any = _guarded(lambda: app(standalone_mode=False))
        except SystemExit as end:
            status = end.code
        if status == STOPPED and "fleetune.engine.launch.cluster" in sys.modules:
            from fleetune.engine.launch import cluster

            cluster.leave()
        sys.exit(status)


@contextlib.contextmanager
def _stopped_once() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does. What comes after the first of them is ignored: it would break off the ending."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    watched = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup's stays
    if threading.current_thread() is not threading.main_thread():
        watched = []

    def stop(*_: Any) -> None:
        for number in watched:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in watched:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in watched:
            if signal.getsignal(number) is stop:  # whoever was stopped is ending
                signal.signal(number, before[number])


@contextlib.contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    """The option parser takes Ctrl-C for itself, so what comes with it is told before."""
    try:
        yield
    except Stopped as stopped:
        raise SystemExit(_complain(f"stopped; go on with {stopped}", {"error": "stopped"}, status=STOPPED)) from None


def _guarded(command: Callable[[], Any]) -> int:
    try:
        status = command()
        if status == STOPPED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except UserError as error:
        return _complain(str(error), error.to_dict(), status=2)
    except RunFailed as error:
        return _complain(f"the run failed: {error}", {"error": "failed", "reason": str(error)}, status=1)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("stopped", {"error": "stopped"}, status=STOPPED)
    except Exception as error:
        if isinstance(error, OSError) and (isinstance(error, WriteFailed) or error.errno in NO_ROOM):
            text = f"{error.filename or 'a file'} cannot be written: {error.strerror or error}"
            return _complain(text, {"error": "failed", "reason": text}, status=1)
        if not hasattr(error, "show"):  # not one of the option parser's own errors
            raise
        error.show()
        return 2
    return status if isinstance(status, int) else 0


def _complain(text: str, document: dict[str, Any], *, status: int) -> int:
    _say(f"fleetune: {text}")
    if "--json" in sys.argv:
        _print_json(document)
    return status


def _show_result(result: Any, as_json: bool) -> None:
    from fleetune.units import duration, energy, size

    if as_json:
        _print_json(result.to_dict())
        return
    metrics, totals = result.metrics, result.totals
    accuracy, before = metrics.get("eval_accuracy"), metrics.get("baseline_eval_accuracy")
    if accuracy is not None:
        start = f"{before:.1%} → " if before is not None else ""
        print(f"accuracy   {start}{accuracy:.1%}")
    if metrics.get("eval_loss") is not None:
        print(f"eval loss  {metrics['baseline_eval_loss']:.3f} → {metrics['eval_loss']:.3f}")
    print(f"virtual    {duration(totals['sim_seconds'])}, {energy(totals['energy_joules'])} on all devices")
    print(f"links      {size(totals['uplink_bytes'])} up, {size(totals['downlink_bytes'])} down")
    if totals.get("num_oom", 0) + totals.get("num_refused", 0) > 0:
        from fleetune.records.run_directory import RunDirectory
        from fleetune.reports.client_stats import refusal_lines

        for i, line in enumerate(refusal_lines(RunDirectory.open(result.run_dir).clients())):
            print(f"{'' if i else 'refused':<10} {line}")
    print(printable(f"run        {result.run_dir}\nnext       fleetune ui · fleetune report {result.run_dir}"))


def _print_json(document: Any) -> None:
    print(json.dumps(_finite(document), default=str), flush=True)


def _finite(value: Any) -> Any:
    """NaN and infinities are no JSON: null. Passwords in addresses are left out."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _say(text: str) -> None:
    print(printable(redacted(text)), file=sys.stderr, flush=True)
