"""Ray's job server: a job or sweep file becomes a job of a cluster, which runs the same command there.

The current folder is sent to the cluster, with this package's code; the job's output and exit status come back. See
https://docs.ray.io/en/latest/cluster/running-applications/job-submission.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fleetune.errors import RunFailed, UserError
from fleetune.spec import load, parse_overrides, read_yaml

Write = Callable[[str], None]
PACKAGE = Path(__file__).parent.parent  # fleetune's own code
CONNECT_SECONDS = 10.0
LOST_SECONDS = 60.0  # a job server that has not answered for so long is given up
# Never sent, in addition to the entries of .gitignore: results, stores, environments, caches.
EXCLUDED = [
    *("runs/", "sweeps/", "mlflow.db*", "mlartifacts/", "mlruns/"),
    *(".git/", ".venv/", "venv/", "node_modules/"),
    *("__pycache__/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/"),
]
# The workspace on the cluster, expanded by the shell there. The job's own folder would not do: Ray deletes it at the end.
DEFAULT_WORKSPACE = '"${FLEETUNE_WORKSPACE:-$HOME/fleetune}"'


@dataclass(frozen=True)
class Submitted:
    """A job that the cluster has accepted."""

    job_id: str
    address: str
    client: Any

    @property
    def how_to_follow(self) -> str:
        """The commands that follow and stop the job."""
        arguments = f"--address {self.address} {self.job_id}"
        return f"follow it: ray job logs --follow {arguments}; stop it: ray job stop {arguments}"


def submit(
    file: Path,
    *,
    address: str,
    assignments: Sequence[str] = (),
    workspace: str | None = None,
    variables: Sequence[str] = (),
    installed: bool = False,
    as_json: bool = False,
) -> Submitted:
    """Check the file here, send the current folder, start the job. Raises UserError if the file or the cluster refuses.

    ``workspace``: a folder on the cluster. ``variables``: names of environment variables that the job gets with their values
    here. ``installed``: the cluster's own fleetune runs the job, not this one.
    """
    if _has_token():
        # Ray sends the token only in this mode, which it reads once, when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    folder = Path.cwd()
    command = ["python", "-m", "fleetune", _checked(file, assignments), _inside(file, folder), "--address", "auto"]
    command += [part for assignment in assignments for part in ("--set", assignment)]
    command += ["--json"] if as_json else []
    quoted = shlex.quote(workspace) if workspace else DEFAULT_WORKSPACE
    runtime_env: dict[str, Any] = {
        "working_dir": str(folder),
        "excludes": EXCLUDED,
        "env_vars": _environment(variables),
    }
    if not installed:
        runtime_env["py_modules"] = [str(PACKAGE)]
    client = connect(address)
    job_id = f"fleetune-{file.stem}-{uuid.uuid4().hex[:6]}"
    with _refusals(address):
        client.submit_job(
            entrypoint=f"{shlex.join(command)} --workspace {quoted}",
            submission_id=job_id,
            runtime_env=runtime_env,
            metadata={"fleetune": file.name},
        )
    return Submitted(job_id, address, client)


def follow(job: Submitted, write: Write) -> int:
    """Write the job's output until it ends; returns its exit status.

    Raises RunFailed if it has none (it was stopped, or never began), or if the job server is gone.
    """
    from ray.job_submission import JobStatus

    shown, seen_at = 0, time.monotonic()

    async def tail() -> None:
        nonlocal shown, seen_at
        position = 0
        async for text in job.client.tail_job_logs(job.job_id):
            position, seen_at = position + len(text), time.monotonic()
            if position > shown:
                write(text[shown - position :])
                shown = position

    while True:
        with suppress(
            Exception
        ):  # after a broken connection, the log comes from its start: what was written is skipped
            asyncio.run(tail())
        with suppress(Exception):
            details = job.client.get_job_info(job.job_id)
            if details.status.is_terminal():
                break
            seen_at = time.monotonic()
        if time.monotonic() - seen_at > LOST_SECONDS:
            raise RunFailed(f"the job server at {job.address} has gone; {job.how_to_follow}")
        time.sleep(1.0)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.driver_exit_code is None or details.status == JobStatus.STOPPED:
        raise RunFailed(f"job {job.job_id}: {details.message or details.status.value.lower()}")
    return int(details.driver_exit_code)


def result_of(job: Submitted) -> Any:
    """The JSON document that a job with ``--json`` printed last; None if there is none."""
    lines = job.client.get_job_logs(job.job_id).strip().splitlines()
    with suppress(json.JSONDecodeError, IndexError):
        return json.loads(lines[-1])
    return None


def connect(address: str) -> Any:
    """A client of the job server at ``http://HEAD:8265``. Raises UserError if none answers, or it refuses the token."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            "must be the URL of the cluster's job server",
            field="--address",
            value=address,
            hint="http://HEAD:8265; a cluster that this machine belongs to is joined by `fleetune run --address`",
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        hint = "is the cluster up, with its dashboard, and is the port open? its own machine: --address http://127.0.0.1:8265"
        raise UserError(f"no job server answers: {error}", field="--address", value=address, hint=hint) from None
    from ray.job_submission import JobSubmissionClient

    # Ray would prefer either of these to the address that it is given.
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        with _refusals(address):
            return JobSubmissionClient(address)
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def _checked(file: Path, assignments: Sequence[str]) -> str:
    """The command for a file, ``run`` or ``sweep``. Raises UserError if its job, or one of its trials, is not valid."""
    overrides = parse_overrides(list(assignments))
    if {"base", "grid", "search"}.isdisjoint(read_yaml(file)):
        load(file, overrides)
        return "run"
    from fleetune.sweep import config
    from fleetune.sweep.expansion import trials_of
    from fleetune.sweep.optuna_search import probes

    sweep = config.load(file, overrides)
    if sweep.search is not None and sweep.search.kind == "optuna":
        probes(sweep)
    else:
        trials_of(sweep)
    return "sweep"


def _has_token() -> bool:
    """True if there is a token in one of the three places where Ray looks for it."""
    variable = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(variable) or Path("~/.ray/auth_token").expanduser().exists()


@contextmanager
def _refusals(address: str) -> Iterator[None]:
    """Turns refusals of the job server into UserError."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise UserError(
            "the cluster refuses this token" if _has_token() else "the cluster wants a token",
            field="--address",
            value=address,
            hint="export RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH=FILE; on the head: ray get-auth-token",
        ) from None
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the job server does not take it: {reason}", field="--address", value=address) from None


def _inside(file: Path, folder: Path) -> str:
    path = file.resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(
            f"lies outside of {folder}, the folder that is sent",
            field="FILE",
            value=str(file),
            hint="run the command in a folder that holds it, and the data that it names",
        )
    return str(path.relative_to(folder.resolve()))


def _environment(names: Sequence[str]) -> dict[str, str]:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError("is not set here", field="--env", value=missing[0], hint=f"export {missing[0]}=…")
    return {name: os.environ[name] for name in names}
