"""Finding runs: in run directories, in folders that hold some, in sweep directories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from fleetune.errors import UserError
from fleetune.records.run_directory import RunDirectory
from fleetune.records.sweep_directory import SweepDirectory


def find_runs(paths: Iterable[str | Path]) -> list[RunDirectory]:
    """The runs in run directories and sweep directories: a run itself, those in ``runs/`` or right below, or its trials.

    Raises UserError if a path holds none.
    """
    found: dict[Path, RunDirectory] = {}
    for path in map(Path, paths):
        runs = list(_runs_of(path))
        if not runs:
            raise UserError("there is no run in this directory", field="path", value=str(path))
        found.update({run.path: run for run in runs})
    return list(found.values())


def _runs_of(path: Path) -> Iterator[RunDirectory]:
    path = path.absolute()
    inside = sorted(p.parent for pattern in ("runs/*/spec.yaml", "*/spec.yaml") for p in path.glob(pattern))
    if (path / SweepDirectory.SPEC).is_file():
        yield from SweepDirectory.open(path).runs()
    elif inside:
        yield from map(RunDirectory.open, inside)
    elif (path / "spec.yaml").is_file():
        yield RunDirectory.open(path)
