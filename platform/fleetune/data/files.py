"""Local data files, read into columns, with errors that name the line.

Formats: JSON Lines (.jsonl), a JSON list of objects (.json), .csv and .tsv with a header line, .parquet.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.errors import UserError, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Table:
    """Columns of one length, as the source gives them, and where each row stands in it."""

    name: str
    columns: dict[str, list[Any]]
    lines: Sequence[int] | None = None

    @classmethod
    def from_rows(cls, name: str, rows: list[dict[str, Any]], lines: Sequence[int] | None = None) -> Table:
        """Rows as columns; a row without a column of the others has None there."""
        names = dict.fromkeys(key for row in rows for key in row)
        return cls(name=name, columns={key: [row.get(key) for row in rows] for key in names}, lines=lines)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def place(self, row: int) -> str:
        """Where a row stands, for an error: ``train.jsonl:7``, or ``train.parquet, row 7`` (from 1)."""
        return f"{self.name}, row {row + 1}" if self.lines is None else f"{self.name}:{self.lines[row]}"


def looks_like_a_file(name: str) -> bool:
    """Whether a dataset's name can only mean a local path."""
    return name.endswith(SUFFIXES) or name.startswith(("/", "./", "../", "~")) or "\\" in name


def read_file(name: str, *, field: str) -> Table:
    """The rows of a local file; ``name`` may start with ``~``. Every fault is a UserError at ``field``."""
    path = Path(name).expanduser()
    if not path.exists():
        raise _missing(path, name, field)
    if path.is_dir():
        found = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        hint = f"it holds {', '.join(found[:8])}" if found else f"formats: {', '.join(SUFFIXES)}"
        raise UserError("a folder; name one file in it", field=field, value=name, hint=hint)
    if path.suffix not in SUFFIXES:
        raise UserError("not a known format", field=field, value=name, hint=f"formats: {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, field=field)
        text = _read_text(path, field=field)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot be read: {reason}", field=field, value=name) from None
    if not text.strip():
        raise UserError("the file is empty", field=field, value=name)
    if path.suffix == ".jsonl":
        return _read_jsonl(path, text, field=field)
    if path.suffix == ".json":
        return _read_json(path, text, field=field)
    return _read_csv(path, text, field=field)


def _missing(path: Path, name: str, field: str) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        return UserError("no such file", field=field, value=name, hint=f"there is no folder {str(folder)!r}")
    guess = nearest(path.name, (p.name for p in folder.iterdir()))
    return UserError("no such file", field=field, value=name, hint=f"did you mean {guess!r}?" if guess else None)


def _read_text(path: Path, *, field: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        rule = f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})"
        raise UserError(rule, field=field, hint="save the file as UTF-8") from None


def _read_jsonl(path: Path, text: str, *, field: str) -> Table:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{path}:{number}: broken JSON: {reason}{at}", field=field) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: each line must be an object, this is {_kind(row)}", field=field)
        rows.append(row)
        lines.append(number)
    return Table.from_rows(str(path), rows, lines)


def _read_json(path: Path, text: str, *, field: str) -> Table:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "one object per line? name the file .jsonl" if error.msg == "Extra data" else None
        rule = f"{path}:{error.lineno}: broken JSON: {error.msg}, column {error.colno}"
        raise UserError(rule, field=field, hint=hint) from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must be a list of objects, this is {_kind(rows)}", field=field)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: item {number} must be an object, this is {_kind(row)}", field=field)
    return Table.from_rows(str(path), rows)


def _read_csv(path: Path, text: str, *, field: str) -> Table:
    """CSV with quotes (RFC 4180), or TSV without (IANA text/tab-separated-values: no field holds a tab)."""
    file = io.StringIO(text, newline="")
    if path.suffix == ".tsv":
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(file, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0]):
                rule = f"{path}:{line}: {_count(len(row), 'field')}, the header has {len(rows[0])}"
                raise UserError(rule, field=field, hint="quote a field that holds the separator")
            if row:
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: broken row: {error}", field=field) from None
    names, *rows = rows
    if len(set(names)) < len(names):
        raise UserError(f"{path}:{lines[0]}: the header names a column twice: {', '.join(names)}", field=field)
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Table(name=str(path), columns=columns, lines=lines[1:])


def _read_parquet(path: Path, *, field: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise UserError(f"not a Parquet file: {error}", field=field, value=str(path)) from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return Table(name=str(path), columns=columns)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
