"""MLflow's own web interface on a workspace's store."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from fleetune.errors import UserError
from fleetune.tracking.client import QUIET
from fleetune.tracking.store import default_uri, ensure_store


def open_ui(workspace: str | Path, port: int = 5000, *, uri: str | None = None) -> NoReturn:
    """Becomes the MLflow UI on a workspace's store, until it is stopped."""
    workspace = Path(workspace).absolute()
    store = uri or default_uri(workspace)
    if uri is None and not (workspace / "mlflow.db").exists():
        hint = "run a job here first, or send a run's records: fleetune sync RUN_DIR"
        raise UserError("this workspace has no MLflow store yet", field="workspace", value=str(workspace), hint=hint)
    ensure_store(store)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1"]
    command += [
        "--port",
        str(port),
        "--workers",
        "1",
        "--artifacts-destination",
        str(workspace / "mlartifacts"),
    ]
    # In place of this process, so that stopping it stops the server.
    os.execve(sys.executable, command, {**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
