"""A run's directory: the truth about a run, from which MLflow, figures and reports are fed.

``spec.yaml`` (resolved), ``rounds.parquet``, ``clients.parquet``, ``result.json``, ``trace.json``,
``adapter/``, ``figures/`` and ``checkpoint/``. A finished round is one file under ``checkpoint/records/``;
:meth:`RunDirectory.consolidate` moves these parts into the two Parquet files. Every file is written beside
its place and renamed into it, so a reader never sees half a file, whenever the writer was killed; what is read
back holds a checksum (:mod:`fleetune.files`). One process writes, any number read.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fleetune import files
from fleetune.errors import UserError
from fleetune.yaml_text import load as load_yaml

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from typing_extensions import Self


FORMAT = 2
"""How a directory is laid out and its rounds are numbered: since 2 from 1, before from 0. It goes up with every change by which
an earlier directory would be misread."""
CHECKSUM = "checksum"
"""The last field of a JSON file."""


class RunDirectory:
    """One run's files. Make one with :meth:`create` or :meth:`open`."""

    SPEC = "spec.yaml"

    def __init__(self, path: Path):
        self.path = path

    # ------------------------------------------------------------------ make and find

    @classmethod
    def create(
        cls,
        workspace: str | Path,
        run_id: str,
        spec: Mapping[str, Any],
        *,
        meta: Mapping[str, Any] | None = None,
        directory: str | Path | None = None,
    ) -> Self:
        """A new run in ``<workspace>/runs/<run_id>``, or in ``<directory>/<run_id>`` where one is given.

        ``meta`` (plain data) may hold ``git_commit``, ``spec_hash``, ``sweep``, ``overrides`` (dotted field
        -> value, what a trial changed), ``parent_run_dir`` and ``dataset`` (name, digest, source,
        num_examples). Raises UserError where the directory already holds a run.
        """
        path = Path(directory or Path(workspace) / "runs").absolute() / run_id
        if (path / cls.SPEC).exists():
            hint = f"resume it with: fleetune resume {path}"
            raise UserError("this directory already holds a run", field="run_dir", value=str(path), hint=hint)
        (path / "checkpoint" / "records").mkdir(parents=True, exist_ok=True)
        run = cls(path)
        place = os.path.relpath(Path(workspace).absolute(), path)
        run._write_json(
            "checkpoint/meta.json",
            {"format": FORMAT, "run_id": run_id, "workspace": place, "started_at": time.time(), **(meta or {})},
        )
        run.write(cls.SPEC, yaml.safe_dump(_plain(spec), sort_keys=False, allow_unicode=True).encode())
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in ``path``. Raises UserError if there is none, or if it has another format (made by another version)."""
        path = Path(path).absolute()
        kind, place = ("run", "runs/<run_id>") if cls is RunDirectory else ("sweep", "sweeps/<name>-<id>")
        if not (path / cls.SPEC).is_file():
            hint = f"a {kind} directory is {place} in a workspace and holds {cls.SPEC}"
            raise UserError(f"this is no {kind} directory", field=f"{kind}_dir", value=str(path), hint=hint)
        run = cls(path)
        if run.format != FORMAT:
            maker = (
                "an earlier version of fleetune, which numbered rounds from 0,"
                if run.format < FORMAT
                else "a later version"
            )
            hint = "start it again in a new workspace, or use the version that made it"
            raise UserError(f"{maker} made it", field=f"{kind}_dir", value=str(path), hint=hint)
        return run

    # ------------------------------------------------------------------ what was run

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.meta.get("run_id", self.path.name))

    @property
    def spec(self) -> dict[str, Any]:
        """The resolved spec as plain data. UserError where somebody broke the file."""
        path, holds = self.path / self.SPEC, "what was run"
        with files.parsing(path, holds=holds):
            values = load_yaml(files.read(path, holds=holds))
        if not isinstance(values, dict):
            raise files.damaged(path, "it holds no fields", holds=holds)
        return values

    @property
    def meta(self) -> dict[str, Any]:
        """What is known of the run besides its spec: git commit, spec hash, sweep, parent, start."""
        found = self._read_json("checkpoint/meta.json")
        if found is None:
            raise files.damaged(
                self.path / "checkpoint/meta.json", "it is missing", holds=_holds("checkpoint/meta.json")
            )
        return found

    def update_meta(self, **fields: Any) -> None:
        """Sets fields of :attr:`meta`."""
        self._write_json("checkpoint/meta.json", {**self.meta, **fields})

    @property
    def format(self) -> int:
        """The format it was made with: `FORMAT`, unless another version made it. Directories of format 1 do not say so."""
        return int(self.meta.get("format", 1))

    @property
    def workspace(self) -> Path:
        """The workspace the run belongs to: two folders up, whatever its files say, as it may come from somebody else."""
        return self.path.parent.parent

    # ------------------------------------------------------------------ rounds, written

    def append_round(self, round_row: Mapping[str, Any], clients: Mapping[str, Any]) -> Path:
        """Adds a finished round: its row, and the clients' columns (arrays or lists of N values, or one value
        for all N). Returns its file, which is there for readers; it outlasts a power cut once ``files.sync`` was called for it.

        ``run_id``, ``round`` and ``stage`` of the clients are taken from the row; columns that are missing
        are null; further ones are kept.
        """
        from fleetune.records import tables

        row = {"run_id": self.run_id, **round_row}
        part = tables.part_bytes(row, clients, recorded_at_ms=time.time_ns() // 1_000_000)
        path = self._part(int(row["round"]))
        files.write(path, part, lasting=False)
        return path

    def consolidate(self) -> None:
        """Moves the parts into ``clients.parquet`` and ``rounds.parquet``. Costs in proportion to the whole
        run.
        """
        parts = self._parts()
        self._write_tables(self._client_table(parts), *self._round_rows(parts))
        for path in parts.values():
            path.unlink(missing_ok=True)

    def truncate(self, num_rounds: int) -> None:
        """Keeps the first ``num_rounds`` rounds, and forgets the later ones and the result: the run goes on
        from there.
        """
        (self.path / "result.json").unlink(missing_ok=True)
        files.clean(self.path)
        for number, path in self._parts().items():
            if number > num_rounds:
                path.unlink(missing_ok=True)
        if (self.path / "rounds.parquet").exists() or (self.path / "clients.parquet").exists():
            import pyarrow.compute as pc

            clients = self._client_table({})
            rows, recorded_at_ms = self._round_rows({})
            kept = [row for row in rows if row["round"] <= num_rounds]
            self._write_tables(clients.filter(pc.less_equal(clients["round"], num_rounds)), kept, recorded_at_ms)

    def _write_tables(self, clients: pa.Table, rows: list[dict[str, Any]], recorded_at_ms: dict[int, int]) -> None:
        """Clients first: a round that is in rounds.parquet has its clients in clients.parquet."""
        from fleetune.records import tables

        times = json.dumps({row["round"]: recorded_at_ms[row["round"]] for row in rows}).encode()
        self._write_parquet("clients.parquet", clients)
        self._write_parquet(
            "rounds.parquet", tables.round_table(rows).replace_schema_metadata({tables.TIME_KEY: times})
        )

    # ------------------------------------------------------------------ rounds, read

    def check(self) -> None:
        """Raises `files.Damaged` where a file of a run that is over is not what was written, or a result has no records."""
        is_over = bool(self.meta) and self.result() is not None
        for name in self._tables():
            try:
                self._read_parquet(name)
            except FileNotFoundError:
                if is_over:
                    raise files.damaged(self.path / name, "it is missing", holds=_holds(name)) from None
        self._check_adapter()

    def _tables(self) -> tuple[str, ...]:
        return ("clients.parquet", "rounds.parquet")

    def _check_adapter(self) -> None:
        """PEFT's own configuration has no room for a checksum: the file of the adapter holds it."""
        from safetensors import safe_open

        model, config = (self.path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
        if not model.exists():
            return
        files.read(model, holds="the adapter")
        with files.parsing(model, holds="the adapter"), safe_open(model, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("fleetune", "{}"))
        expected = header.get("metadata", {}).get(config.name)
        if expected is not None and (not config.exists() or files.checksum(config.read_bytes()) != expected):
            raise files.damaged(config, "its checksum does not match", holds="how the adapter is used")

    def check_rounds(self, num_rounds: int) -> None:
        """Raises `files.Damaged` unless the records of the first ``num_rounds`` rounds are all there, whole."""
        parts = {number: path for number, path in self._parts().items() if number <= num_rounds}
        for path in parts.values():
            files.read(path, holds=_holds(path.name), must_be_sealed=True)
        stored = set(self._round_rows({})[1])
        if stored and not (self.path / "clients.parquet").exists():
            raise files.damaged(self.path / "clients.parquet", "it is missing", holds=_holds("clients.parquet"))
        self._client_table({})
        for missing in sorted(set(range(1, num_rounds + 1)) - parts.keys() - stored)[:1]:
            path = self._part(missing)
            raise files.damaged(path, "it is missing", holds=_holds(path.name))

    def num_recorded(self) -> int:
        """How many rounds there are records of, up to the last one."""
        return max([*self._parts(), *self._round_rows({})[1]], default=0)

    def rounds(self) -> pd.DataFrame:
        """One row per finished round, in order; null is NaN."""
        from fleetune.records import tables

        return tables.round_table(self._round_rows(self._parts())[0]).to_pandas()

    def clients(self) -> pd.DataFrame:
        """One row per client and round, in order of rounds; null is NaN."""
        return self._client_table(self._parts()).to_pandas()

    def round_rows(self, *, first_round: int = 1) -> list[tuple[dict[str, Any], int]]:
        """(row, real time of recording in ms since 1970) of each finished round from ``first_round`` on."""
        parts = {number: path for number, path in self._parts().items() if number >= first_round}
        rows, recorded_at_ms = self._round_rows(parts)
        return [(row, recorded_at_ms[row["round"]]) for row in rows if row["round"] >= first_round]

    def _round_rows(self, parts: dict[int, Path]) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """Parts first, then the Parquet file: a part that vanishes meanwhile has just been moved there."""
        from fleetune.records import tables

        found: dict[int, tuple[dict[str, Any], int]] = {}
        for number, path in parts.items():
            with contextlib.suppress(FileNotFoundError):
                found[number] = tables.read_part_row(path)
        with contextlib.suppress(FileNotFoundError):
            table = self._read_parquet("rounds.parquet")
            times = {
                int(k): v for k, v in json.loads((table.schema.metadata or {}).get(tables.TIME_KEY, b"{}")).items()
            }
            for row in table.to_pylist():
                found.setdefault(row["round"], (row, times.get(row["round"], 0)))
        ordered = sorted(found)
        return [found[number][0] for number in ordered], {number: found[number][1] for number in ordered}

    def _client_table(self, parts: dict[int, Path]) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        from fleetune.records import tables

        found: list[tuple[int, pa.Table]] = []
        for number, path in parts.items():
            with contextlib.suppress(FileNotFoundError):
                found.append((number, tables.read_part_clients(path)))
        with contextlib.suppress(FileNotFoundError):
            table = self._read_parquet("clients.parquet")
            if found:
                newer = pa.array([number for number, _ in found], type=pa.int32())
                table = table.filter(pc.invert(pc.is_in(table["round"], value_set=newer)))
            found.append((0, table))
        if not found:
            return tables.client_table({}, defaults={})
        table = pa.concat_tables(
            [table for _, table in sorted(found, key=lambda f: f[0])], promote_options="permissive"
        )
        rounds = table["round"].to_numpy()
        if len(rounds) and (rounds[1:] < rounds[:-1]).any():
            table = table.sort_by("round")
        return table

    # ------------------------------------------------------------------ result

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes ``result.json``; from then on the run counts as over (``status``: finished or failed)."""
        self._write_json("result.json", result)

    def result(self) -> dict[str, Any] | None:
        """The result, or None while the run goes on."""
        return self._read_json("result.json")

    # ------------------------------------------------------------------ files

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file of this directory in one step, for good: readers see the old one or the new one."""
        files.write(self.path / name, content)

    def _write_parquet(self, name: str, table: pa.Table) -> None:
        from fleetune.records import tables

        self.write(name, tables.parquet_bytes(table))

    def _read_parquet(self, name: str) -> pa.Table:
        """A table; FileNotFoundError where it is not there."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, holds = self.path / name, _holds(name)
        content = files.read(path, holds=holds)
        with files.parsing(path, holds=holds):
            return pq.read_table(pa.BufferReader(content))

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write(name, json.dumps({**_plain(value), CHECKSUM: files.BLANK}, indent=2).encode())

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path, holds = self.path / name, _holds(name)
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

    @property
    def _records(self) -> Path:
        return self.path / "checkpoint" / "records"

    def _part(self, number: int) -> Path:
        return self._records / f"round_{number:08d}.arrow"

    def _parts(self) -> dict[int, Path]:
        """Round, from 1 -> its part, in order."""
        return {int(path.stem.removeprefix("round_")): path for path in sorted(self._records.glob("round_*.arrow"))}


def _holds(name: str) -> str:
    """What is lost with a file."""
    if name.startswith("round_"):
        return f"the records of round {int(Path(name).stem.removeprefix('round_'))}"
    kinds = {
        "clients.parquet": "the clients' records",
        "rounds.parquet": "the rounds' records",
        "trials.parquet": "the sweep's table",
        "result.json": "the result",
        "checkpoint/meta.json": "what is known of the run besides its spec",
    }
    return kinds[name]


def parent_of(run: RunDirectory) -> Path | None:
    """The directory of the sweep this run is a trial of (absolute, or relative to the run), or None."""
    parent = run.meta.get("parent_run_dir")
    return Path(os.path.normpath(run.path / parent)) if parent else None


def _plain(value: Any) -> Any:
    """Plain data for YAML and JSON: NumPy values, paths and tuples become numbers, strings and lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
