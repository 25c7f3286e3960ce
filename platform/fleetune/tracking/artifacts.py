"""The files of a run that are sent: those that lie in its directory and are not half written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def files_of(run_path: Path, names: Iterable[str]) -> tuple[list[Path], list[str]]:
    """(files under these names, links that lead out of the directory, relative to it).

    A link is followed only to what the run itself holds: whoever hands on a run could otherwise have the one who sends it
    upload files of their own. What a kill left half written (``….tmp``) is none of the run's files.
    """
    home = run_path.resolve()
    files: list[Path] = []
    left_out: list[str] = []
    for name in names:
        for path in _walk(run_path / name):
            inside = path.resolve().is_relative_to(home)
            if not inside:
                left_out.append(str(path.relative_to(run_path)))
            elif path.is_file() and path.suffix != ".tmp":
                files.append(path)
    return files, left_out


def _walk(path: Path) -> Iterator[Path]:
    """Files under a path in order, without going through links to folders; such links themselves."""
    if path.is_symlink() or not path.is_dir():
        if os.path.lexists(path):
            yield path
        return
    for inner in sorted(path.iterdir()):
        yield from _walk(inner)
