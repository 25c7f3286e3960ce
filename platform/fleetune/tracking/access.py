"""Asks an MLflow server, before any work starts, if it lets us in. Does not import mlflow, which takes seconds."""

from __future__ import annotations

import base64
import configparser
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from fleetune.errors import UserError
from fleetune.redaction import without_secrets

TIMEOUT_SECONDS = 5.0
# Ways of being let in that only MLflow's own client knows (mlflow.environment_variables, mlflow 3.17).
OTHER_WAYS = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
USERNAME, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"


def check_access(uri: str | None) -> None:
    """Raises UserError if an MLflow server refuses our user, or wants one and we have none.

    Silent if the store is no server, and if nobody answers: a server that is away does not keep a run from
    starting, since the records are sent once it is back.
    """
    if not (uri or "").startswith(("http://", "https://")) or any(os.environ.get(name) for name in OTHER_WAYS):
        return
    try:
        where, proof = without_password(str(uri)), _authorization(str(uri))
        request = urllib.request.Request(
            f"{where.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1",
            headers={"Authorization": proof} if proof else {},
        )
        urllib.request.build_opener(_StayHere).open(request, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise _refused(where, has_sent_proof=proof is not None) from None
    except (OSError, ValueError):
        return


def check_no_secret(uri: str | None, *, field: str = "tracking.uri") -> None:
    """Raises UserError if an address holds a password or a token: it would be noted with the run, and shown to all who see it."""
    shown = without_secrets(uri or "")
    if shown != re.sub(r"\s", "%20", uri or ""):
        servers = f"export {USERNAME} and {PASSWORD}, or {TOKEN}"
        databases = "a database is better reached through an MLflow server, or with ~/.pgpass or PGPASSWORD"
        hint = servers if str(uri).startswith("http") else databases
        raise UserError("must hold no password and no token", field=field, value=shown, hint=f"leave it out; {hint}")


def without_password(uri: str) -> str:
    """A URI that can be shown and noted: without the user and password it may hold."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would carry the password elsewhere."""

    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        """None: the redirection is the answer."""


def _authorization(uri: str) -> str | None:
    """The header that MLflow's client sends: from the URI, the environment, or ~/.mlflow/credentials."""
    parts = urlsplit(uri)
    stored = _credentials_file()
    user = unquote(parts.username or "") or os.environ.get(USERNAME) or stored.get(USERNAME.lower())
    password = unquote(parts.password or "") or os.environ.get(PASSWORD) or stored.get(PASSWORD.lower())
    if user and password:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    token = os.environ.get(TOKEN)
    return f"Bearer {token}" if token else None


def _credentials_file() -> dict[str, str]:
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(Path("~/.mlflow/credentials").expanduser())
    except (configparser.Error, OSError, RuntimeError, UnicodeDecodeError):
        return {}
    return dict(config["mlflow"]) if "mlflow" in config else {}


def _refused(where: str, *, has_sent_proof: bool) -> UserError:
    rule = (
        "the MLflow server refuses this user or password"
        if has_sent_proof
        else "the MLflow server wants a user and password"
    )
    hint = f"export {USERNAME} and {PASSWORD}, or run with tracking.enabled=false and send the records later"
    return UserError(rule, field="tracking.uri", value=where, hint=f"{hint}: fleetune sync RUN_DIR")
