"""A workspace's MLflow store: whole or not there, whoever makes it, together or killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetune.errors import UserError
from fleetune.tracking import store as tracking_store
from fleetune.tracking.client import make_client
from fleetune.tracking.store import default_uri, ensure_store, newest_version, read_schema
from fleetune.tracking.sync import sync
from fleetune.tracking.ui import open_ui
from support.stored import expected_steps, steps
from support.synthetic_runs import make_run, make_spec

ENSURE = "import sys; from fleetune.tracking.store import ensure_store; ensure_store(sys.argv[1])"


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one run in its store: making one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    run = make_run(folder, "a", spec=make_spec(num_rounds=2))
    (run.path / "figures").mkdir()  # drawn already
    sync(run.path)
    return folder


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as store:
        for statement in statements:
            store.execute(statement)
        store.commit()


def half_made(path: Path) -> None:
    """What a kill in the midst of MLflow's own migrations left: tables of its first version, and one that was to be renamed."""
    from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    engine.dispose()
    change(path, "create table _alembic_tmp_experiments (experiment_id integer)")


@pytest.mark.slow
def test_several_that_start_together_make_one_whole_store(tmp_path: Path):
    """And what killed makers left under the other name is in nobody's way."""
    (tmp_path / "mlflow.db.making").write_bytes(b"half of it")
    uri = default_uri(tmp_path)
    processes = [subprocess.Popen([sys.executable, "-c", ENSURE, uri], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert read_schema(tmp_path / "mlflow.db").version == newest_version()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.slow
def test_a_kill_while_it_is_made_leaves_none(tmp_path: Path):
    """Killed with half of its tables there: the store has not come to be, and the next one makes it."""
    making = tmp_path / "mlflow.db.making"
    with subprocess.Popen([sys.executable, "-c", ENSURE, default_uri(tmp_path)], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not making.exists() or making.stat().st_size < 100_000:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert making.exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_one_that_an_earlier_version_left_half_made_is_made_anew(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It held nothing yet. By `sync`; the half stays beside it, in case anybody should miss it."""
    monkeypatch.setattr(tracking_store, "_make", lambda path: shutil.copy(sent / "mlflow.db", path))  # takes seconds
    run = make_run(tmp_path, "a", spec=make_spec(num_rounds=2))
    (run.path / "figures").mkdir()
    half_made(tmp_path / "mlflow.db")
    report = sync(run.path)
    assert steps(report.uri, report.mlflow_run_id) == expected_steps(run)
    assert (tmp_path / "mlflow.db.half-made").exists()


def test_the_ui_is_opened_on_a_whole_store(sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The server would end at the half that a kill left; it listens on this machine alone."""
    monkeypatch.setattr(tracking_store, "_make", lambda path: shutil.copy(sent / "mlflow.db", path))
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda program, command, env: commands.append(command))
    half_made(tmp_path / "mlflow.db")
    open_ui(tmp_path)
    assert read_schema(tmp_path / "mlflow.db").version == newest_version()
    (command,) = commands
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_an_older_store_keeps_its_runs(sent: Path, tmp_path: Path):
    """A store of an older MLflow, killed in its upgrade: a copy is upgraded and put in its place; the old one stays beside it."""
    path = tmp_path / "mlflow.db"
    shutil.copy(sent / "mlflow.db", path)
    newest, before = last_two_versions()
    undo_last(path, before)
    change(path, "create table _alembic_tmp_runs (run_uuid text)")
    ensure_store(default_uri(tmp_path))
    schema = read_schema(path)
    assert (schema.version, schema.num_entries) == (newest, read_schema(sent / "mlflow.db").num_entries)
    assert not [table for table in schema.tables if table.startswith("_alembic_tmp_")]
    assert read_schema(tmp_path / f"mlflow.db.{before}").version == before


def last_two_versions() -> tuple[str, str]:
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    steps = ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()
    return next(steps).revision, next(steps).revision


def undo_last(path: Path, before: str) -> None:
    """With MLflow's own step back."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine_with_retry

    engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    config = _get_alembic_config(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        try:
            command.downgrade(config, before)
        except NotImplementedError:  # a step without a way back
            pytest.skip("MLflow's last migration cannot be undone")
    engine.dispose()


def is_of_the_future(path: Path) -> None:
    change(path, "update alembic_version set version_num = 'ffffffffffff'")


def is_no_database(path: Path) -> None:
    path.write_bytes(b"no database " * 100)


@pytest.mark.parametrize(
    ("spoil", "told"), [(is_of_the_future, "is of another MLflow"), (is_no_database, "is damaged")]
)
def test_one_that_cannot_be_used_says_so_and_is_left_alone(
    spoil: Callable[[Path], None], told: str, sent: Path, tmp_path: Path
):
    path = tmp_path / "mlflow.db"
    shutil.copy(sent / "mlflow.db", path)
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=told) as caught:
        make_client(default_uri(tmp_path))
    assert (caught.value.field, path.read_bytes()) == ("tracking.uri", before)
    assert "fleetune sync" in str(caught.value)


def test_others_databases_and_servers_are_not_looked_at(tmp_path: Path):
    for uri in ("http://127.0.0.1:1", "postgresql://me@127.0.0.1:1/db", "sqlite://", f"file://{tmp_path}"):
        ensure_store(uri)
    assert list(tmp_path.iterdir()) == []
