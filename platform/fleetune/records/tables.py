"""One finished round as one Arrow file, and any number of them as a table. Pure: values in, values out.

A part holds the clients' rows as its table and the round's row as JSON in its schema's metadata, so that
one atomic rename makes a round and its clients visible together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fleetune import files
from fleetune.columns import CLIENT_COLUMNS, PERSONAL_COLUMNS, ROUND_COLUMNS, arrow_schema
from fleetune.records.stored_files import CHECKSUM_KEY, plain

ROUND_KEY, TIME_KEY, PERSONAL_KEY = b"fleetune.round", b"fleetune.recorded_at_ms", b"fleetune.personal"


def part_bytes(
    round_row: Mapping[str, Any],
    clients: Mapping[str, Any],
    personal: Mapping[str, Any] | None = None,
    *,
    recorded_at_ms: int,
) -> memoryview:
    """One round as an Arrow IPC file with room for its checksum.

    ``clients`` holds columns of N values, or one value for all N; ``personal`` those of the M clients whose own model was
    evaluated after it, which stand beside the round's row.
    """
    table = client_table(clients, defaults={k: round_row.get(k) for k in ("run_id", "round", "stage")})
    row = {"peak_memory_bytes_max": largest_peak(table), **round_row}
    text = json.dumps(row, default=plain).encode()
    metadata = {ROUND_KEY: text, TIME_KEY: str(recorded_at_ms).encode(), CHECKSUM_KEY: files.BLANK.encode()}
    if personal is not None:
        columns = {"run_id": row.get("run_id"), "round": row.get("round"), **personal}
        metadata[PERSONAL_KEY] = json.dumps(plain(columns)).encode()
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def client_table(columns: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> pa.Table:
    """Columns -> a table in the order of the schema; missing columns are null, further ones come last."""
    columns = {**defaults, **columns}
    num_rows = max((len(v) for v in columns.values() if _is_column(v)), default=0)
    schema = arrow_schema(CLIENT_COLUMNS)
    fields: dict[str, pa.Array] = {}
    for field in schema:
        fields[field.name] = _array(columns.get(field.name), num_rows=num_rows, arrow_type=field.type)
    for name in columns:
        if name not in fields:
            fields[name] = _array(columns[name], num_rows=num_rows, arrow_type=None)
    return pa.table(fields)


def personal_table(columns: Mapping[str, Any]) -> pa.Table:
    """Columns of M values (or one for all M) -> a table with the schema of personal.parquet; missing columns are null."""
    num_rows = max((len(v) for v in columns.values() if _is_column(v)), default=0)
    fields = {
        field.name: _array(columns.get(field.name), num_rows=num_rows, arrow_type=field.type, nan_is_null=False)
        for field in arrow_schema(PERSONAL_COLUMNS)
    }
    return pa.table(fields)


def read_part_personal(path: Path) -> pa.Table | None:
    """The rows of one part about clients' own models; None if none were evaluated. Raises `files.Damaged`."""
    content = files.read(path, holds="a round's records", must_be_sealed=True)
    with files.parsing(path, holds="a round's records"):
        metadata = pa.ipc.open_file(pa.BufferReader(content)).schema.metadata or {}
        return personal_table(json.loads(metadata[PERSONAL_KEY])) if PERSONAL_KEY in metadata else None


def largest_peak(clients: pa.Table) -> int | None:
    """The largest ``peak_memory_bytes`` of clients that were not refused; None if none ran."""
    import pyarrow.compute as pc

    refused = pc.is_in(clients["status"], value_set=pa.array(["oom", "refused"]))
    ran = clients.filter(pc.invert(pc.fill_null(refused, False)))
    return pc.max(ran["peak_memory_bytes"]).as_py()


def round_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows -> a table with the schema's columns, then the columns that only this method has, each of one type."""
    rows = list(rows)
    schema = arrow_schema(ROUND_COLUMNS)
    fields: dict[str, pa.Array] = {}
    for field in schema:
        values = [row.get(field.name) for row in rows]
        fields[field.name] = _array(values, num_rows=len(rows), arrow_type=field.type, nan_is_null=False)
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in fields:
            fields[name] = _array([row.get(name) for row in rows], num_rows=len(rows), arrow_type=None)
    return pa.table(fields)


def read_part_row(path: Path) -> tuple[dict[str, Any], int]:
    """The round's row of one part, and when it was written (ms since 1970). Raises `files.Damaged`."""
    content = files.read(path, holds="a round's records", must_be_sealed=True)
    with files.parsing(path, holds="a round's records"):
        metadata = pa.ipc.open_file(pa.BufferReader(content)).schema.metadata
        return json.loads(metadata[ROUND_KEY]), int(metadata[TIME_KEY])


def read_part_clients(path: Path) -> pa.Table:
    """The clients' rows of one part. Raises `files.Damaged`."""
    content = files.read(path, holds="a round's records", must_be_sealed=True)
    with files.parsing(path, holds="a round's records"):
        return pa.ipc.open_file(pa.BufferReader(content)).read_all().replace_schema_metadata(None)


def _is_column(value: Any) -> bool:
    return isinstance(value, list | tuple | pa.Array | pa.ChunkedArray) or (
        isinstance(value, np.ndarray) and value.ndim > 0
    )


def _array(values: Any, *, num_rows: int, arrow_type: pa.DataType | None, nan_is_null: bool = True) -> pa.Array:
    """Values as one Arrow array. None becomes null. NaN does too, unless ``nan_is_null`` is False: a loss can be NaN."""
    if not _is_column(values):
        if arrow_type is None:
            arrow_type = pa.scalar(values).type if values is not None else pa.null()
        return pa.repeat(pa.scalar(values, type=arrow_type), num_rows)
    if arrow_type is not None and pa.types.is_integer(arrow_type):
        values = _integers(values)
    try:
        return pa.array(values, type=arrow_type, from_pandas=nan_is_null)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if arrow_type is not None:
            raise
        return pa.array([None if value is None else str(value) for value in values])


def _integers(values: Any) -> Any:
    """Counts as integers. One NaN (for none) makes floats of a whole NumPy column; here it becomes null."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        return values
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        present = np.isfinite(values)
        return pa.array(np.rint(np.where(present, values, 0)).astype(np.int64), mask=~present)
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    return [None if value is None or value != value else round(value) for value in values]
