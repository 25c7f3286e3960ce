"""Passwords in addresses: refused where an address is given, and shown, noted and sent nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.errors import RunFailed, UserError
from fleetune.records import RunDirectory
from fleetune.redaction import redacted
from fleetune.spec import job_text
from fleetune.tracking.sync import sync
from support import commands, tiny
from support.synthetic_runs import make_spec

WITH_SECRETS = [
    "http://me:hunter2@host:5000/x",
    "http://me:hun%40ter2@host",
    "http://me:p@hunter2/wo?rd@host",
    "http://me:it's hunter2@host",
    "https://hunter2@host",
    "http://me:hunter2@[::1]:5000",
    "postgresql://me:hunter2@host/db",
    "postgresql://:hunter2@host/db",
    "mysql+pymysql://me:p/hunter2@host/db",
    "postgresql://host/db?user=me&password=hunter2",
    "postgresql://host/db?sslpassword=hunter2",
    "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dhunter2%3BX%3D1",
    "https://host/mlflow?access_token=hunter2",
    "s3://key:hunter2@bucket/x",
]
WITHOUT = [
    "http://host:5000/x@y",
    "http://host:5000",
    "http://[::1]:5000/a@b",
    "postgresql://me@host/db",
    "sqlite:////tmp/a@b/mlflow.db",
    "databricks://profile",
    "http://host/?max_tokens=5",
    "s3://bucket/a:b",
]


@pytest.mark.parametrize("uri", WITH_SECRETS)
def test_a_password_in_an_address_is_refused_and_not_shown(uri: str):
    with pytest.raises(UserError, match=r"tracking\.uri=.*must hold no password") as caught:
        tiny.spec({"tracking.uri": uri})
    assert "hunter2" not in f"{caught.value} {caught.value.to_dict()}"
    assert "leave it out" in str(caught.value)


@pytest.mark.parametrize("uri", WITHOUT)
def test_an_address_without_one_is_as_it_was(uri: str):
    assert redacted(f"see {uri} or '{uri}'.") == f"see {uri} or '{uri}'."
    assert tiny.spec({"tracking.uri": uri}).tracking.uri == uri


@pytest.mark.parametrize("command", ["run", "sweep", "submit"])
def test_no_command_shows_or_keeps_a_password(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Given with --set, in the file, and as a mapping's place, where another rule is broken."""
    job = commands.job_file(tmp_path)
    file = job
    if command == "sweep":
        file = tmp_path / "sweep.yaml"
        file.write_text("base: job.yaml\ngrid: {tracking.uri: ['http://me:hunter2@host']}\n")
    more = ["--address", "http://127.0.0.1:1"] if command == "submit" else ["-w", tmp_path / "ws"]
    monkeypatch.chdir(tmp_path)
    for setting in ("tracking.uri=http://me:hunter2@host", "tracking=http://me:hunter2@host"):
        out = commands.fleetune(capfd, monkeypatch, command, file, *more, "--set", setting, "--json")
        assert out.status == 2
        assert "hunter2" not in out.stdout + out.stderr
    assert not (tmp_path / "ws").exists()


def test_an_older_run_with_a_password_is_not_sent(tmp_path: Path):
    """Its spec.yaml would be: neither its own address nor one that is given may hold any."""
    spec = make_spec(num_rounds=1)
    run = RunDirectory.create(tmp_path, "a", {**spec, "tracking": {"uri": "http://me:hunter2@127.0.0.1:1"}})
    other = RunDirectory.create(tmp_path, "b", spec)
    for call in (lambda: sync(run.path), lambda: sync(other.path, uri="http://me:hunter2@127.0.0.1:1")):
        with pytest.raises(UserError, match="must hold no password") as caught:
            call()
        assert "hunter2" not in str(caught.value)


def test_what_others_say_is_told_without_the_password(tmp_path: Path):
    """A library's error text, and the job file as MLflow's note shows it."""
    said = "could not connect to postgresql://me:hunter2@host/db"
    assert "hunter2" not in str(RunFailed(said))
    error = UserError(said, field="x", value="http://me:hunter2@h", hint="http://me:hunter2@h")
    assert "hunter2" not in str(error)
    file = tmp_path / "job.yaml"
    file.write_text("# was: http://me:hunter2@host\nname: a\n")
    text = job_text(file, ["tracking.uri=http://me:hunter2@host"])
    assert text == "# was: http://***@host\nname: a\n# --set tracking.uri=http://***@host"
