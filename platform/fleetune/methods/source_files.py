"""The files that a class from outside the package is written in: they are part of the identity of a run that uses it."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from fleetune.digests import file_digest


def source_digests(classes: Iterable[type]) -> dict[str, str]:
    """Name -> digest of the files of classes, and of the modules beside them that these import, directly or over others.

    Beside a file is what lies in the folder of its top-level package or module; of installed packages, the package itself. So
    a helper of the user's own belongs to the method, and the libraries that they use do not. Names are relative to that folder.
    """
    digests: dict[str, str] = {}
    for name in sorted({cls.__module__ for cls in classes}):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            digests.update(_digests(name, Path(file)))
    return digests


def _digests(module: str, file: Path) -> dict[str, str]:
    root = file.parents[module.count(".") + (file.stem == "__init__")]
    # In a folder with all installed packages, only the method's own one belongs to it.
    own = f"{module.partition('.')[0]}." if _is_installed(root) else ""
    digests: dict[str, str] = {}
    waiting = [*_with_parents(module)]
    while waiting:
        name = waiting.pop()
        path = file if name == module else _file_of(name, root)
        if path is None or not f"{name}.".startswith(own) or (shown := path.relative_to(root).as_posix()) in digests:
            continue
        digests[shown] = file_digest(path)
        if path.suffix == ".py":
            waiting += _imports(path, name)
    return digests


def _is_installed(folder: Path) -> bool:
    places = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    return folder.resolve() in places or "site-packages" in folder.parts


def _file_of(module: str, root: Path) -> Path | None:
    """The file of a module below a folder; None if it has none there."""
    path = root.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _with_parents(module: str) -> Iterator[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``: importing a module runs the packages that it lies in."""
    parts = module.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _imports(path: Path, module: str) -> Iterator[str]:
    """All modules that a file names in an import, wherever it stands; some of the names may be of functions or classes."""
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            holder = [*above, *([node.module] if node.module else [])]
            names = [".".join([*holder, alias.name]) for alias in node.names]
        for name in names:
            yield from _with_parents(name)
