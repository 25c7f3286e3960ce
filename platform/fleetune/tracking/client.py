"""MLflow's client: quiet, impatient, and never creating a thing twice because an answer was lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fleetune.tracking.store import ensure_store

T = TypeVar("T")
# No usage reports, no links printed between our own lines, and a server that is away is noticed within seconds.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
IMPATIENT = {RETRIES: "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# Packages whose errors mean that the store, and not the run's files, is the trouble.
OF_A_STORE = {
    "mlflow",
    "requests",
    "urllib3",
    "sqlalchemy",
    "sqlite3",
    "botocore",
    "boto3",
    "azure",
    "google",
    "http",
    "socket",
    "ssl",
}
# Errors of MLflow after which nobody knows whether the call was carried out (mlflow 3.17).
UNCLEAR = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"}
TRIES = 2


def make_client(uri: str) -> Any:
    """A client of a store. An SQLite store is made or repaired first."""
    for name, value in {**QUIET, **IMPATIENT}.items():
        os.environ.setdefault(name, value)
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    ensure_store(uri)
    return MlflowClient(tracking_uri=uri)


def made_once(make: Callable[[], T], find: Callable[[], T | None]) -> T:
    """Returns what ``make`` creates. If its answer is lost, ``find`` looks for it before ``make`` is called again."""
    from mlflow.exceptions import MlflowException

    for is_last in (False,) * (TRIES - 1) + (True,):
        try:
            with _no_retries():
                return make()
        except MlflowException as error:
            if error.error_code not in UNCLEAR:
                raise
            found = find()
            if found is not None:
                return found
            if is_last or "timeout exception" in str(error):  # which the server may still be at work on
                raise
    raise AssertionError


def is_of_the_store(error: BaseException) -> bool:
    """True if the store has failed, and not the run's own files."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(kind.__module__.partition(".")[0] in OF_A_STORE for kind in type(error).__mro__)


@contextlib.contextmanager
def _no_retries() -> Iterator[None]:
    """MLflow's client repeats every call that fails, also those that create; it asks the environment at each call."""
    before = os.environ.get(RETRIES)
    os.environ[RETRIES] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[RETRIES]
        else:
            os.environ[RETRIES] = before
