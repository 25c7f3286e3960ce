"""The servers of a shared installation, on this machine: MLflow with basic authentication on PostgreSQL and an S3 store.

``python tests/support/services.py COMMAND…`` runs a shell command beside them, with
MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD set.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from support import REPOSITORY

SERVE = REPOSITORY / "cluster" / "mlflow" / "serve.sh"
BUCKET = "fleetune"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}


def missing() -> str | None:
    """What these servers need and this machine lacks; None where all is there."""
    if postgres_program("initdb") is None:
        return "PostgreSQL's server (Debian, Ubuntu: apt-get install postgresql)"
    packages = [name for name in ("psycopg2", "boto3", "moto", "flask_wtf") if find_spec(name) is None]
    return f"the Python packages of fleetune[test]: {', '.join(packages)}" if packages else None


def postgres_program(name: str) -> str | None:
    """Path of a program of PostgreSQL's server; Debian keeps them off the PATH."""
    beside = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(beside[-1]) if beside else None)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server with an empty database, on a free port of this machine. Yields the database's URI."""
    folder = Path(tempfile.mkdtemp(prefix="fleetune-postgres-"))
    # PostgreSQL refuses to run as root, and then needs a folder that its own user can enter.
    as_user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    password, port = secrets.token_hex(16), free_port()
    secret = folder / "password"
    secret.write_text(password)
    if as_user:
        for path in (folder, secret):
            shutil.chown(path, "postgres", "postgres")
    initdb = [postgres_program("initdb"), "-D", folder / "data", "-U", "mlflow", "--pwfile", secret]
    initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"]
    options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "max_connections": 300}
    server = [postgres_program("postgres"), "-D", folder / "data"]
    server += [f"--{name}={value}" for name, value in options.items()]
    try:
        subprocess.run(initdb, check=True, cwd=folder, **QUIET, **as_user)
        with process(server, is_up=lambda: answers(port), stop=signal.SIGINT, cwd=folder, **as_user):
            yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An S3-compatible store, in memory. Yields the variables with which clients find it."""
    port = free_port()
    server = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with process(server, is_up=lambda: answers(port)):
        yield {
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": secrets.token_hex(8),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_DEFAULT_REGION": "us-east-1",
        }


class MLflowServer:
    """The MLflow server of cluster/compose.yaml, which can be killed and started again.

    ``env``: what its clients need to be let in.
    """

    def __init__(self, database_uri: str, store: Mapping[str, str], *, workers: int = 1):
        self._running = contextlib.ExitStack()
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        self.env = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16)}
        self._env = {
            **os.environ,
            **store,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DATABASE_URI": database_uri,
            "BUCKET": BUCKET,
            "PORT": str(port),
            "WORKERS": str(workers),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.env["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def start(self) -> None:
        """Until it answers."""
        server = process(["sh", SERVE], is_up=lambda: healthy(self.uri), stop=signal.SIGKILL, env=self._env)
        self._running.enter_context(server)

    def kill(self) -> None:
        """As a crash does."""
        self._running.close()


@contextlib.contextmanager
def mlflow_on_postgres(*, workers: int = 1) -> Iterator[MLflowServer]:
    """An MLflow server, its database and its store, running for the body."""
    with postgres() as database_uri, s3() as store:
        server = MLflowServer(database_uri, store, workers=workers)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def process(
    command: list[Any], *, is_up: Callable[[], bool], stop: signal.Signals = signal.SIGTERM, **how: Any
) -> Iterator[None]:
    """A server as the leader of its own group of processes, which ends with the body."""
    with tempfile.TemporaryFile("w+") as said:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
        server = subprocess.Popen([str(part) for part in command], start_new_session=True, **streams, **how)
        try:
            deadline = time.monotonic() + 120
            while not is_up():
                if server.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RuntimeError(f"it did not come up: {command[:4]} … said\n{said.read()[-2000:]}")
                time.sleep(0.1)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, stop) if stop == signal.SIGKILL else server.send_signal(stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def healthy(uri: str) -> bool:
    """Whether an MLflow server answers there."""
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"{uri}/health", timeout=2).status == 200
    return False


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main(command: list[str]) -> int:
    """Run a shell command beside the servers."""
    if lacking := missing():
        print(f"missing: {lacking}", file=sys.stderr)
        return 2
    with mlflow_on_postgres(workers=4) as server:
        env = {**os.environ, **server.env, "MLFLOW_TRACKING_URI": server.uri}
        return subprocess.run(" ".join(command), shell=True, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
