"""Local data files, read into columns, with errors that name the line.

Formats: JSON Lines (.jsonl), a JSON list of objects (.json), .csv and .tsv with a header line, .parquet.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetune.data.json_text import JsonFault, items, parse
from fleetune.errors import UserError, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
MAX_FIELD = 2**31 - 1  # characters of a CSV field; the module's own limit is 131,072


@dataclass(frozen=True)
class Table:
    """Columns of one length with the values of the source, and the line of each row."""

    name: str
    columns: dict[str, list[Any]]
    lines: Sequence[int] | None = None
    """The line of each row, (n,), from 1; None if the source has no lines."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Column -> reason, for columns that cannot be read: an error only if one of them is needed."""

    @classmethod
    def from_rows(cls, name: str, rows: list[dict[str, Any]], lines: Sequence[int] | None = None) -> Table:
        """Rows as columns; a row without a column of the others has None there."""
        names = dict.fromkeys(key for row in rows for key in row)
        return cls(name=name, columns={key: [row.get(key) for row in rows] for key in names}, lines=lines)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    @property
    def names(self) -> list[str]:
        """All columns, the unreadable ones too."""
        return [*self.columns, *self.unreadable]

    def place(self, row: int) -> str:
        """Where a row stands, for an error: ``train.jsonl:7``, or ``train.parquet, row 7`` (from 1)."""
        return f"{self.name}, row {row + 1}" if self.lines is None else f"{self.name}:{self.lines[row]}"


def looks_like_a_file(name: str) -> bool:
    """True if a dataset's name can only mean a local path."""
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
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        rule = f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})"
        raise UserError(rule, field=field, hint="save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL byte, so this is no text", field=field, hint="save the file as UTF-8")
    return text


def _read_jsonl(path: Path, text: str, *, field: str) -> Table:
    rows, lines = [], []
    is_list = text.lstrip().startswith("[")
    hint = "a JSON list, not one object per line? name the file .json" if is_list else None
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
        line = line.removeprefix("\ufeff")  # files that were joined have their marks in the middle
        if not line.strip():
            continue
        try:
            row = parse(line)
        except JsonFault as error:
            at = "" if error.at is None else f", column {error.at + 1}"
            raise UserError(f"{path}:{number}: broken JSON: {error}{at}", field=field, hint=hint) from None
        if not isinstance(row, dict):
            rule = f"{path}:{number}: each line must be an object, this is {_kind(row)}"
            raise UserError(rule, field=field, hint=hint)
        rows.append(row)
        lines.append(number)
    return Table.from_rows(str(path), rows, lines)


def _read_json(path: Path, text: str, *, field: str) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    line, counted = 1, 0
    try:
        if not text.lstrip().startswith("["):
            value = parse(text)
            raise UserError(
                f"{path}: must be a list of objects, this is {_kind(value)}", field=field, hint=_inner_list(value)
            )
        for start, row in items(text):
            line, counted = line + text.count("\n", counted, start), start
            if not isinstance(row, dict):
                rule = f"{path}:{line}: item {len(rows) + 1} must be an object, this is {_kind(row)}"
                raise UserError(rule, field=field)
            rows.append(row)
            lines.append(line)
    except JsonFault as error:
        at = error.at or 0
        column = at - text.rfind("\n", 0, at)
        hint = "one object per line? name the file .jsonl" if str(error) == "Extra data" else None
        rule = f"{path}:{text.count(chr(10), 0, at) + 1}: broken JSON: {error}, column {column}"
        raise UserError(rule, field=field, hint=hint) from None
    return Table.from_rows(str(path), rows, lines)


def _inner_list(value: Any) -> str | None:
    """A hint for a file whose list is the value of a name, as in ``{"data": [...]}``."""
    parts = value.items() if isinstance(value, dict) else ()
    lists = [name for name, part in parts if isinstance(part, list) and part and isinstance(part[0], dict)]
    return f"save the list under {lists[0]!r} as a file of its own" if lists else None


def _read_csv(path: Path, text: str, *, field: str) -> Table:
    """CSV with quotes (RFC 4180), or TSV without (IANA text/tab-separated-values: no field holds a tab)."""
    former = csv.field_size_limit(MAX_FIELD)
    try:
        rows, lines = _csv_rows(path, text, field=field)
    finally:
        csv.field_size_limit(former)
    names, *rows = rows
    _check_names(names, f"{path}:{lines[0]}: the header", field=field, hint="the first line must be a header")
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Table(name=str(path), columns=columns, lines=lines[1:])


def _csv_rows(path: Path, text: str, *, field: str) -> tuple[list[list[str]], list[int]]:
    """All rows with fields, the header first, and the line where each begins."""
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
    return rows, lines


def _check_names(names: list[str], where: str, *, field: str, hint: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{where} names a column twice: {', '.join(names)}", field=field, hint=hint)


def _read_parquet(path: Path, *, field: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)  # read_table would take key=value in the path for a column
        names = file.schema_arrow.names
        _check_names(names, f"{path}: the schema", field=field, hint="rename one of them")
        table = file.read()
    except pa.ArrowException as error:
        raise UserError(f"not a Parquet file: {error}", field=field, value=str(path)) from None
    columns: dict[str, list[Any]] = {}
    unreadable: dict[str, str] = {}
    for name in names:
        try:
            columns[name] = _values(table.column(name))
        except UnicodeDecodeError:
            unreadable[name] = "its text is not UTF-8"
        except (pa.ArrowException, ValueError, OverflowError) as error:  # dates beyond Python's, for one
            unreadable[name] = str(error)
    return Table(name=str(path), columns=columns, unreadable=unreadable)


def _values(column: Any) -> list[Any]:
    """An Arrow column's cells. Short floats get the digits that tell them apart: 0.1, not 0.10000000149011612."""
    import pyarrow as pa

    values: list[Any] = column.to_pylist()
    if not (pa.types.is_float32(column.type) or pa.types.is_float16(column.type)):
        return values
    short = column.type.to_pandas_dtype()
    return [None if value is None else float(str(short(value))) for value in values]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
