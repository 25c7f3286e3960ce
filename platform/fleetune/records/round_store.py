"""A run's rounds: a file (part) per finished round, and the Parquet files that the parts are moved into."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune import files
from fleetune.records.stored_files import StoredFiles, content_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


class RoundStore(StoredFiles):
    """The records of one run's rounds and clients."""

    @property
    def run_id(self) -> str:
        """The run's id: its directory's name, unless the run knows another one."""
        return self.path.name

    # ------------------------------------------------------------------ written

    def append_round(
        self, round_row: Mapping[str, Any], clients: Mapping[str, Any], personal: Mapping[str, Any] | None = None
    ) -> Path:
        """Adds a finished round: its row, and the columns of its N clients (arrays or lists of N values, or one value for all).

        Readers see the returned file at once; it outlasts a power cut after ``files.sync``. ``run_id``, ``round`` and
        ``stage`` of the clients come from the row. Missing columns are null, and columns beyond the table's are stored, too.
        ``personal``: columns of personal.parquet, if clients' own models were evaluated after the round.
        """
        from fleetune.records import tables

        row = {"run_id": self.run_id, **round_row}
        part = tables.part_bytes(row, clients, personal, recorded_at_ms=time.time_ns() // 1_000_000)
        path = self._part(int(row["round"]))
        files.write(path, part, lasting=False)
        return path

    def consolidate(self) -> None:
        """Moves the parts into the Parquet files; rewrites them, so it is called seldom."""
        parts = self._parts()
        self._write_tables(self._client_table(parts), self._personal_table(parts), *self._round_rows(parts))
        for path in parts.values():
            path.unlink(missing_ok=True)

    def truncate(self, num_rounds: int) -> None:
        """Removes all rounds but the first ``num_rounds``, and the result: the run goes on from there."""
        (self.path / "result.json").unlink(missing_ok=True)
        files.clean(self.path)
        for number, path in self._parts().items():
            if number > num_rounds:
                path.unlink(missing_ok=True)
        if (self.path / "rounds.parquet").exists() or (self.path / "clients.parquet").exists():
            import pyarrow.compute as pc

            clients, personal = (
                table.filter(pc.less_equal(table["round"], num_rounds))
                for table in (self._client_table({}), self._personal_table({}))
            )
            rows, recorded_at_ms = self._round_rows({})
            earlier = [row for row in rows if row["round"] <= num_rounds]
            self._write_tables(clients, personal, earlier, recorded_at_ms)

    def _write_tables(
        self, clients: pa.Table, personal: pa.Table, rows: list[dict[str, Any]], recorded_at_ms: dict[int, int]
    ) -> None:
        """Writes the clients first, so that every round in rounds.parquet has its clients in the other tables.

        A run that evaluates no client's own model has no ``personal.parquet``.
        """
        from fleetune.records import tables

        times = json.dumps({row["round"]: recorded_at_ms[row["round"]] for row in rows}).encode()
        self._write_parquet("clients.parquet", clients)
        if len(personal) or (self.path / "personal.parquet").exists():
            self._write_parquet("personal.parquet", personal)
        self._write_parquet(
            "rounds.parquet", tables.round_table(rows).replace_schema_metadata({tables.TIME_KEY: times})
        )

    # ------------------------------------------------------------------ read

    def check_rounds(self, num_rounds: int) -> None:
        """Raises `files.Damaged` unless the records of the first ``num_rounds`` rounds are there and undamaged."""
        parts = {number: path for number, path in self._parts().items() if number <= num_rounds}
        for path in parts.values():
            files.read(path, holds=content_of(path.name), must_be_sealed=True)
        stored = set(self._round_rows({})[1])
        if stored and not (self.path / "clients.parquet").exists():
            raise files.damaged(self.path / "clients.parquet", "it is missing", holds=content_of("clients.parquet"))
        self._client_table({})
        for missing in sorted(set(range(1, num_rounds + 1)) - parts.keys() - stored)[:1]:
            path = self._part(missing)
            raise files.damaged(path, "it is missing", holds=content_of(path.name))

    def num_recorded(self) -> int:
        """Returns the number of rounds up to the last one that is recorded."""
        return max([*self._parts(), *self._round_rows({})[1]], default=0)

    def rounds(self) -> pd.DataFrame:
        """One row per finished round, in order; null is NaN."""
        from fleetune.records import tables

        return tables.round_table(self._round_rows(self._parts())[0]).to_pandas()

    def clients(self) -> pd.DataFrame:
        """One row per client and round, in order of rounds; null is NaN."""
        return self._client_table(self._parts()).to_pandas()

    def personal(self) -> pd.DataFrame:
        """One row per client and round after which its own model was evaluated, in order of rounds; empty if none was."""
        return self._personal_table(self._parts()).to_pandas()

    def round_rows(self, *, first_round: int = 1) -> list[tuple[dict[str, Any], int]]:
        """(row, real time of recording in ms since 1970) of each finished round from ``first_round`` on."""
        parts = {number: path for number, path in self._parts().items() if number >= first_round}
        rows, recorded_at_ms = self._round_rows(parts)
        return [(row, recorded_at_ms[row["round"]]) for row in rows if row["round"] >= first_round]

    def _round_rows(self, parts: dict[int, Path]) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """Returns the rows in order, and round -> time of recording (ms since 1970).

        Reads the parts before the Parquet file: a part that vanishes in between has just been moved there.
        """
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

    def _personal_table(self, parts: dict[int, Path]) -> pa.Table:
        import pyarrow as pa

        from fleetune.records import tables

        found: dict[int, pa.Table] = {}  # by round, so that one that is in a part and in the file counts once
        for number, path in parts.items():
            with contextlib.suppress(FileNotFoundError):
                table = tables.read_part_personal(path)
                if table is not None:
                    found[number] = table
        with contextlib.suppress(FileNotFoundError):
            table = self._read_parquet("personal.parquet")
            rounds = table["round"].to_numpy()
            for number in sorted(set(rounds.tolist()) - found.keys()):
                found[number] = table.filter(pa.array(rounds == number))
        return pa.concat_tables([tables.personal_table({}), *(found[number] for number in sorted(found))])

    # ------------------------------------------------------------------ parts

    @property
    def _records(self) -> Path:
        return self.path / "checkpoint" / "records"

    def _part(self, number: int) -> Path:
        return self._records / f"round_{number:08d}.arrow"

    def _parts(self) -> dict[int, Path]:
        """Round, from 1 -> its part, in order."""
        return {int(path.stem.removeprefix("round_")): path for path in sorted(self._records.glob("round_*.arrow"))}
