"""A sweep's directory: what was to be tried, and a table with a row per trial.

``sweep.yaml`` (resolved: a sweep file again, its base as a mapping), ``trials.parquet``, ``claims.json`` (the verdicts on its
claims), ``result.json`` (written last) and ``figures/``. The trials themselves are runs like all others, in ``runs/`` of the
workspace; the table names them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.columns import TRIAL_COLUMNS, arrow_schema
from fleetune.errors import UserError
from fleetune.records.naming import filled_fields
from fleetune.records.run_directory import RunDirectory

if TYPE_CHECKING:
    import pandas as pd

PREFIX = "set."


class SweepDirectory(RunDirectory):
    """One sweep's files. Make one with :meth:`create` or :meth:`open`."""

    SPEC = "sweep.yaml"

    def write_trials(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes ``trials.parquet`` in one step. A row holds columns of the schema (those that are missing are null), and
        ``overrides``: dotted field -> value, which become the columns ``set.<field>``. ``run_dir`` is noted relative to
        the sweep, so that a workspace can be moved.
        """
        import pyarrow as pa

        rows = [{**row, "run_dir": self._relative(row.get("run_dir"))} for row in rows]
        changed = [filled_fields(row["overrides"]) for row in rows]
        schema = arrow_schema(TRIAL_COLUMNS)
        columns = {column.name: pa.array([row.get(column.name) for row in rows], column.type) for column in schema}
        for field in dict.fromkeys(field for overrides in changed for field in overrides):
            columns[PREFIX + field] = _column([overrides.get(field) for overrides in changed])
        self._write_parquet("trials.parquet", pa.table(columns))

    def trials(self) -> pd.DataFrame:
        """One row per trial, in order of their numbers; ``run_dir`` is absolute, null is NaN."""
        try:
            table = self._read_parquet("trials.parquet").to_pandas()
        except FileNotFoundError:
            raise UserError("this sweep has no trials yet", field="sweep_dir", value=str(self.path)) from None
        table["run_dir"] = [self._run_path(place) for place in table["run_dir"]]
        return table

    def rows(self) -> list[dict[str, Any]]:
        """One row per trial as plain values, in order of their numbers, with ``overrides`` as they were written; null is None."""
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(self.path / "trials.parquet").to_pylist()
        except FileNotFoundError:
            return []
        for row in rows:
            row["run_dir"] = self._run_path(row["run_dir"])
            changed = {name: row.pop(name) for name in list(row) if name.startswith(PREFIX)}
            row["overrides"] = {
                name.removeprefix(PREFIX): value for name, value in changed.items() if value is not None
            }
        return rows

    def write_csv(self) -> None:
        """Writes ``trials.csv``, which MLflow's UI and spreadsheets show as a table. Texts that a spreadsheet would take for a
        formula get a quote before them (OWASP, CSV injection); numbers stay numbers.
        """
        table = self.trials()
        texts = table.select_dtypes(exclude="number")
        # With this terminator a \r within a text is quoted.
        lines = table.assign(**texts.map(_no_formula)).to_csv(index=False, lineterminator="\r\n")
        self.write("trials.csv", lines.encode())

    def write_verdicts(self, verdicts: Sequence[Mapping[str, Any]]) -> None:
        """Writes ``claims.json``: the verdicts on the sweep's claims. It goes away where there are none."""
        if verdicts:
            self._write_json("claims.json", {"claims": list(verdicts)})
        else:
            (self.path / "claims.json").unlink(missing_ok=True)

    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts on the sweep's claims as they were written last; empty if there are none."""
        return list((self._read_json("claims.json") or {}).get("claims") or [])

    def replace_claims(self, claims: Sequence[Mapping[str, Any]]) -> None:
        """Puts other claims into ``sweep.yaml``. They are the one part of a sweep that may change after its start."""
        spec = {name: value for name, value in self.spec.items() if name != "claims"}
        self.write_spec({**spec, "claims": list(claims)} if claims else spec)

    def runs(self) -> list[RunDirectory]:
        """The trials' runs that have started."""
        places: Iterable[Any] = self.trials()["run_dir"] if (self.path / "trials.parquet").is_file() else []
        return [RunDirectory(Path(p)) for p in places if isinstance(p, str) and (Path(p) / "spec.yaml").is_file()]

    def _tables(self) -> tuple[str, ...]:
        return ("trials.parquet",)

    def _relative(self, run_dir: Any) -> str | None:
        return None if run_dir is None else os.path.relpath(run_dir, self.path)

    def _run_path(self, place: Any) -> str | None:
        return os.path.normpath(self.path / place) if isinstance(place, str) else None


def open_directory(path: str | Path) -> RunDirectory:
    """The run or the sweep in ``path``. Raises UserError if there is neither."""
    is_sweep = (Path(path) / SweepDirectory.SPEC).is_file()
    return SweepDirectory.open(path) if is_sweep else RunDirectory.open(path)


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _column(values: list[Any]) -> Any:
    """Swept values as a column of one type: numbers, booleans or strings as they are, a mixture or lists as text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {bool, str}):
        plain = [float(v) if kinds == {int, float} and v is not None else v for v in values]
        return pa.array(plain)
    return pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values], pa.string())
