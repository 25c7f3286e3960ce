"""The commands in the order of ``fleetune --help``, and the entry point: errors become messages and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from fleetune.cli.adapters import adapters
from fleetune.cli.catalogue import list_, schema
from fleetune.cli.check import check
from fleetune.cli.jobs import plan, resume, run, sweep
from fleetune.cli.output import complain
from fleetune.cli.results import report, sync, ui
from fleetune.cli.stopping import STOPPED, stop_once
from fleetune.cli.submit import submit
from fleetune.errors import RunFailed, UserError
from fleetune.files import NO_ROOM, WriteFailed

app = typer.Typer(
    help="Simulate federated fine-tuning of language models on many small devices, and what it costs each of them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run,
    "plan": plan,
    "resume": resume,
    "sweep": sweep,
    "submit": submit,
    "sync": sync,
    "report": report,
    "list": list_,
    "check": check,
    "ui": ui,
    "schema": schema,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(adapters, name="adapters", no_args_is_help=True)


def main() -> None:
    """Run the command. Exit status: 0 success, 1 a failed run, 2 a mistake of the user, 130 stopped."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Ray's own handler would answer SIGTERM with a stack of its C++ calls.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    with stop_once():
        try:
            status: Any = exit_status(lambda: app(standalone_mode=False))
        except SystemExit as end:
            status = end.code
        if status == STOPPED and "fleetune.engine.launch.cluster" in sys.modules:
            from fleetune.engine.launch import cluster

            cluster.leave()
        sys.exit(status)


def exit_status(command: Callable[[], Any]) -> int:
    """Call a command; prints its error, if any. Errors of the program itself are raised."""
    try:
        status = command()
        if status == STOPPED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except UserError as error:
        return complain(str(error), error.to_dict(), status=2)
    except RunFailed as error:
        return complain(f"the run failed: {error}", {"error": "failed", "reason": str(error)}, status=1)
    except (typer.Abort, KeyboardInterrupt):
        return complain("stopped", {"error": "stopped"}, status=STOPPED)
    except Exception as error:
        if isinstance(error, OSError) and (isinstance(error, WriteFailed) or error.errno in NO_ROOM):
            text = f"{error.filename or 'a file'} cannot be written: {error.strerror or error}"
            return complain(text, {"error": "failed", "reason": text}, status=1)
        if not hasattr(error, "show"):  # not one of the option parser's own errors
            raise
        error.show()
        return 2
    return status if isinstance(status, int) else 0
