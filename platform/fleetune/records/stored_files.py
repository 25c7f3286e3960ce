"""Files with a checksum: JSON and Parquet, written in one step, and refused when they are read back damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune import files

if TYPE_CHECKING:
    import pyarrow as pa


CHECKSUM = "checksum"
"""The last field of a JSON file."""
CHECKSUM_KEY = b"fleetune.checksum"
"""The key under which the metadata of an Arrow or Parquet file holds it."""


class StoredFiles:
    """The files of one directory."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file of this directory in one step, so that it lasts: readers see the old one or the new one."""
        files.write(self.path / name, content)

    def _write_parquet(self, name: str, table: pa.Table) -> None:
        self.write(name, parquet_bytes(table))

    def _read_parquet(self, name: str) -> pa.Table:
        """Reads a table. Raises FileNotFoundError if it is not there, and `files.Damaged`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, holds = self.path / name, content_of(name)
        content = files.read(path, holds=holds)
        with files.parsing(path, holds=holds):
            return pq.read_table(pa.BufferReader(content))

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write(name, json.dumps({**plain(value), CHECKSUM: files.BLANK}, indent=2).encode())

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path, holds = self.path / name, content_of(name)
        try:
            content = files.read(path, holds=holds)
        except FileNotFoundError:
            return None
        with files.parsing(path, holds=holds):
            value = json.loads(content)
        if not isinstance(value, dict):
            raise files.damaged(path, "it holds no fields", holds=holds)
        value.pop(CHECKSUM, None)
        return value


def parquet_bytes(table: pa.Table) -> memoryview:
    """A table as a Parquet file with room for its checksum."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({CHECKSUM_KEY.decode(): files.BLANK})
    return memoryview(sink.getvalue())


def content_of(name: str) -> str:
    """Names what a file holds, for the message that it is damaged."""
    if name.startswith("round_"):
        return f"the records of round {int(Path(name).stem.removeprefix('round_'))}"
    if name.startswith("method/stage_"):
        return f"what the method keeps of stage {Path(name).stem.removeprefix('stage_')}"
    kinds = {
        "clients.parquet": "the clients' records",
        "personal.parquet": "the records of clients' own models",
        "rounds.parquet": "the rounds' records",
        "trials.parquet": "the sweep's table",
        "result.json": "the result",
        "claims.json": "the verdicts on the claims",
        "checkpoint/meta.json": "what is known of the run besides its spec",
    }
    return kinds[name]


def plain(value: Any) -> Any:
    """Plain data for YAML and JSON: NumPy values, paths and tuples become numbers, strings and lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
