"""A run's directory: the truth about a run, from which MLflow, figures and reports are fed.

``spec.yaml`` (resolved), ``rounds.parquet``, ``clients.parquet``, ``personal.parquet``, ``result.json``, ``trace.json``,
``method/``, ``adapter/``, ``figures/`` and ``checkpoint/``. A finished round is one file under ``checkpoint/records/``;
``consolidate`` (:mod:`fleetune.records.round_store`) moves these parts into the Parquet files. Every file is written beside
its place and renamed into it, so a reader never sees half a file, whenever the writer was killed; what is read
back holds a checksum (:mod:`fleetune.files`). One process writes, any number read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fleetune import files
from fleetune.errors import UserError
from fleetune.records.round_store import RoundStore
from fleetune.records.stored_files import content_of, plain
from fleetune.yaml_text import load as load_yaml

if TYPE_CHECKING:
    from typing_extensions import Self


FORMAT = 2
"""How a directory is laid out and its rounds are numbered: since 2 from 1, before from 0. It goes up with every change by which
an earlier directory would be misread."""


class RunDirectory(RoundStore):
    """One run's files. Make one with :meth:`create` or :meth:`open`."""

    SPEC = "spec.yaml"

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
        """A new run in ``<workspace>/runs/<run_id>``, or in ``<directory>/<run_id>`` if one is given.

        ``meta`` (plain data) may hold ``git_commit``, ``spec_hash``, ``sweep``, ``overrides`` (dotted field
        -> value, what a trial changed), ``parent_run_dir`` and ``dataset`` (name, digest, source,
        num_examples). Raises UserError if the directory already holds a run.
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
        run.write_spec(spec)
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
        """The resolved spec as plain data. Raises UserError if the file is broken."""
        path, holds = self.path / self.SPEC, "what was run"
        with files.parsing(path, holds=holds):
            values = load_yaml(files.read(path, holds=holds))
        if not isinstance(values, dict):
            raise files.damaged(path, "it holds no fields", holds=holds)
        return values

    def write_spec(self, spec: Mapping[str, Any]) -> None:
        """Writes the resolved spec."""
        self.write(self.SPEC, yaml.safe_dump(plain(spec), sort_keys=False, allow_unicode=True).encode())

    @property
    def meta(self) -> dict[str, Any]:
        """Facts about the run besides its spec: git commit, spec hash, sweep, parent, start."""
        found = self._read_json("checkpoint/meta.json")
        if found is None:
            raise files.damaged(
                self.path / "checkpoint/meta.json", "it is missing", holds=content_of("checkpoint/meta.json")
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
        """The workspace that the run belongs to: two folders up. Its files are not asked, as they may come from somebody else."""
        return self.path.parent.parent

    # ------------------------------------------------------------------ how it came out

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes ``result.json``; from then on the run counts as over (``status``: finished or failed)."""
        self._write_json("result.json", result)

    def result(self) -> dict[str, Any] | None:
        """The result, or None while the run goes on."""
        return self._read_json("result.json")

    def write_stage(self, stage: int, records: Mapping[str, Any]) -> None:
        """Writes what the method keeps of a stage, ``method/stage_<n>.json``."""
        self._write_json(f"method/stage_{stage}.json", records)

    def stages(self) -> dict[int, dict[str, Any]]:
        """Stage, from 0 -> what the method has kept of it, in order; stages of which it keeps nothing are not there."""
        names = [path.name for path in (self.path / "method").glob("stage_*.json")]
        numbers = sorted(int(Path(name).stem.removeprefix("stage_")) for name in names)
        return {n: self._read_json(f"method/stage_{n}.json") or {} for n in numbers}

    def check(self) -> None:
        """Raises `files.Damaged` if a file of a finished run is not as it was written, or if a result has no records."""
        is_over = bool(self.meta) and self.result() is not None
        for name in self._tables():
            try:
                self._read_parquet(name)
            except FileNotFoundError:
                if is_over:
                    raise files.damaged(self.path / name, "it is missing", holds=content_of(name)) from None
        self._check_adapter()

    def _tables(self) -> tuple[str, ...]:
        own = ("personal.parquet",) if (self.path / "personal.parquet").exists() else ()
        return ("clients.parquet", *own, "rounds.parquet")

    def _check_adapter(self) -> None:
        """The configuration may be PEFT's own, with no room for a checksum, so the adapter's file holds it, too."""
        from safetensors import safe_open

        model = self.path / "adapter" / "adapter_model.safetensors"
        if not model.exists():
            return
        files.read(model, holds="the adapter")
        with files.parsing(model, holds="the adapter"), safe_open(model, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("fleetune", "{}"))
        for name, expected in header.get("metadata", {}).items():
            config = model.with_name(name)
            if not config.exists() or files.checksum(config.read_bytes()) != expected:
                raise files.damaged(config, "its checksum does not match", holds="how the adapter is used")


def parent_of(run: RunDirectory) -> Path | None:
    """The directory of the sweep this run is a trial of (absolute, or relative to the run), or None."""
    parent = run.meta.get("parent_run_dir")
    return Path(os.path.normpath(run.path / parent)) if parent else None
