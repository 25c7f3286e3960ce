"""A workspace's own MLflow store, an SQLite file: whole or not there, whoever makes it and whenever they are killed.

MLflow makes its tables in some fifty steps, of which none can be undone halfway. So they are made under another name, by one
process at a time, and renamed. What an interrupted maker of an earlier version left is found by its schema's version.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from fleetune.errors import UserError
from fleetune.locks import locked

LEFTOVER = "_alembic_tmp_"  # the table in which a migration prepares a new form of another one (alembic, batch mode)


@dataclass(frozen=True)
class Schema:
    """What an SQLite file holds of MLflow."""

    tables: frozenset[str]
    version: str | None
    num_entries: int
    """Runs and registered models."""


def ensure_store(uri: str) -> None:
    """The store at ``uri`` is whole afterwards: made, repaired or brought to the form of this MLflow. Other stores than SQLite
    files are left alone. UserError where it is damaged, or of a newer MLflow.
    """
    path = file_of(uri)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f"{path.name}.lock")):
        schema = read_schema(path)
        if not schema.tables:
            _make(path)
        elif schema.version != newest_version() and "experiments" in schema.tables:
            if schema.version is not None and schema.version not in versions():
                raise UserError(
                    f"the MLflow store is of another MLflow (its schema is {schema.version})",
                    field="tracking.uri",
                    value=uri,
                    hint="install that MLflow again, or move the file away and send the runs anew: fleetune sync RUN_DIR",
                )
            if schema.num_entries:
                _upgrade(path, schema)
            else:  # half made, and nothing in it yet
                os.replace(path, path.with_name(f"{path.name}.half-made"))
                _make(path)


def default_uri(workspace: str | Path) -> str:
    """The store in a workspace: an SQLite file."""
    return f"sqlite:///{Path(workspace).absolute() / 'mlflow.db'}"


def file_of(uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url

    name = make_url(uri).database
    return Path(name).absolute() if name and name != ":memory:" and not name.startswith("file:") else None


def read_schema(path: Path) -> Schema:
    """Tables, version and what is in them. UserError where the file is no database."""
    if not path.exists() or not path.stat().st_size:
        return Schema(frozenset(), None, 0)
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as store:
            tables = frozenset(name for (name,) in store.execute("select name from sqlite_master where type = 'table'"))
            found = (
                store.execute("select version_num from alembic_version") if "alembic_version" in tables else iter(())
            )
            version = next(iter(found), (None,))[0]
            counted = [name for name in ("runs", "registered_models") if name in tables]
            num_entries = sum(store.execute(f"select count(*) from {name}").fetchone()[0] for name in counted)
    except sqlite3.DatabaseError as error:
        raise _broken(path, str(error)) from None
    return Schema(tables, version, num_entries)


@functools.cache
def newest_version() -> str:
    """The schema of the MLflow that is installed."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())


@functools.cache
def versions() -> frozenset[str]:
    """All schemas that it knows."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    return frozenset(step.revision for step in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions())


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    making = path.with_name(f"{path.name}.making")
    _remove(making)
    store = SqlAlchemyStore(f"sqlite:///{making}", (path.parent / "mlartifacts").as_uri())
    store._dispose_engine()
    _into_place(making, path)


def _upgrade(path: Path, schema: Schema) -> None:
    """A store of an older MLflow, or one whose upgrade was interrupted: a copy is upgraded, and the old file stays beside it."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry

    making = path.with_name(f"{path.name}.making")
    _remove(making)
    with (
        contextlib.closing(sqlite3.connect(path, timeout=20)) as old,
        contextlib.closing(sqlite3.connect(making)) as new,
    ):
        old.backup(new)
        for table in (name for name in schema.tables if name.startswith(LEFTOVER)):
            target = table.removeprefix(LEFTOVER)  # gone where the kill came between its removal and the renaming
            new.execute(
                f'drop table "{table}"' if target in schema.tables else f'alter table "{table}" rename to "{target}"'
            )
        new.commit()
    try:
        engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{making}")
        _initialize_tables(engine)
        engine.dispose()
    except Exception as error:
        raise _broken(
            path, f"an upgrade of its tables was interrupted ({str(error).strip().splitlines()[0][:200]})"
        ) from None
    if read_schema(making).version != newest_version():
        raise _broken(path, "its tables cannot be upgraded")
    kept = path.with_name(f"{path.name}.{schema.version or 'before'}")
    if not kept.exists():
        shutil.copy2(path, kept)
    _into_place(making, path)


def _into_place(making: Path, path: Path) -> None:
    """Rename a finished file, so that it lasts."""
    with making.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(making, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(making: Path) -> None:
    """What a killed maker left, with SQLite's own files beside it."""
    for ending in ("", "-journal", "-wal", "-shm"):
        making.with_name(making.name + ending).unlink(missing_ok=True)


def _broken(path: Path, reason: str) -> UserError:
    hint = "move the file away and send the runs anew, which hold all that was in it: fleetune sync RUN_DIR"
    return UserError(
        f"the MLflow store is damaged: {reason}", field="tracking.uri", value=f"sqlite:///{path}", hint=hint
    )
