"""Finds the class of a method by its name in a job file: built in, in a module of the user's, or from an installed package."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fleetune.errors import UserError, nearest, unknown_name
from fleetune.methods import METHODS
from fleetune.methods.base import Method, MethodConfig
from fleetune.methods.source_files import source_digests

GROUP = "fleetune.methods"
"""The group of entry points by which an installed package offers its methods."""
MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


_found: dict[str, type[Method]] = {}  # methods from outside, by their names in a job file
_code: dict[type[Method], dict[str, str]] = {}  # digests of the files of methods, as they were when first asked for
_folders: list[str] = []  # folders of the job files that this process has read, the last one first


def find_method(name: str, *, field: str = "method.name") -> type[Method]:
    """The class of a method. ``name``: a key of METHODS, ``module:Class``, or the name of an entry point.

    Raises UserError if there is none, if its module cannot be imported, or if the class is not a complete method. ``field``: the
    field or option that the error names.
    """
    if name in METHODS:
        return METHODS[name]
    if name not in _found:
        _found[name] = _from_outside(name, field)
        code_of(_found[name])
    return _found[name]


def code_of(method: type[Method]) -> dict[str, str]:
    """Name -> digest of the files that a method from outside is written in; none for a method of this package.

    They are read once, when the method is imported: what a process runs does not change with the file afterwards.
    """
    if method not in _code:
        classes = {*method.__mro__, *method.Config.__mro__} - {*Method.__mro__, *MethodConfig.__mro__}
        _code[method] = source_digests(cls for cls in classes if cls.__module__.partition(".")[0] != "fleetune")
    return _code[method]


def installed_methods() -> dict[str, EntryPoint]:
    """The methods that installed packages offer, by name. A method of this package is not replaced."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in METHODS}


def known_methods() -> list[type[Method]]:
    """The built-in methods, and those from outside that this process has found."""
    return [*METHODS.values(), *_found.values()]


def look_in(folder: str | Path) -> None:
    """Look for modules in this folder too, before all others: where a job file lies."""
    path = str(Path(folder).resolve())
    _folders[:] = [path, *(other for other in _folders if other != path)]


def code_path() -> tuple[str, ...]:
    """The folders in which a method's module is looked for beside the installed packages: of job files, and the current one."""
    return tuple(dict.fromkeys([*_folders, *_current_folder()]))


def code_path_elsewhere() -> tuple[str, ...]:
    """`code_path` for another process: those inside the current folder also relative to it.

    A folder that was submitted lies elsewhere on each node, but is every worker's current folder.
    """
    inside = [
        str(Path(folder).relative_to(here))
        for here in _current_folder()
        for folder in code_path()
        if Path(folder).is_relative_to(here)
    ]
    return (*code_path(), *inside)


def _current_folder() -> list[str]:
    with suppress(OSError):  # it was deleted
        return [str(Path.cwd())]
    return []


def _from_outside(name: str, field: str) -> type[Method]:
    if ":" in name:
        return _from_module(name, name, field)
    offered = installed_methods()
    if name in offered:
        return _from_module(offered[name].value, name, field)
    error = unknown_name("method", name, [*METHODS, *offered], field=field)
    raise UserError(error.rule, field=field, value=name, hint=f"{error.hint}; one of your own: my_module:MyMethod")


def _from_module(reference: str, name: str, field: str) -> type[Method]:
    """The class that ``module:Class`` refers to."""
    module_name, _, class_name = reference.partition(":")
    if not MODULE_NAME.fullmatch(module_name) or not class_name.isidentifier():
        hint = "for example my_package.my_module:MyMethod, with dots and without .py"
        raise UserError("must name a module and a class in it", field=field, value=name, hint=hint)
    if module_name == "__main__":
        hint = "move the class to a module of its own, which every process can import"
        raise UserError("no other process can import a script or a notebook", field=field, value=name, hint=hint)
    module = _imported(module_name, name, field)
    if not hasattr(module, class_name):
        methods = [other for other, value in vars(module).items() if _is_method(value) and value is not Method]
        guess = nearest(class_name, methods) or ", ".join(methods)
        hint = f"it has {guess}" if guess else "define it there, as a subclass of fleetune.methods.base.Method"
        raise UserError(f"{module.__file__} has no class {class_name}", field=field, value=name, hint=hint)
    return _complete(getattr(module, class_name), name, field)


def _imported(module_name: str, name: str, field: str) -> Any:
    try:
        with _searched(code_path()):
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            files = [path.stem for folder in code_path() for path in Path(folder).glob("*.py")]
            guess = nearest(module_name, files)
            hint = f"it is looked for in {', '.join(code_path())} and among the installed packages"
            hint = f"did you mean {guess}? {hint}" if guess else hint
            raise UserError(f"there is no module {error.name}", field=field, value=name, hint=hint) from None
        raise _broken(error, name, field) from error
    except (Exception, SystemExit) as error:  # the module is the user's code, and may do anything
        raise _broken(error, name, field) from error


def _broken(error: BaseException, name: str, field: str) -> UserError:
    text = " ".join(str(error).split())
    rule = f"its module cannot be imported: {type(error).__name__}: {text}"
    return UserError(rule, field=field, value=name, hint=f"see python -c 'import {name.partition(':')[0]}'")


@contextmanager
def _searched(folders: tuple[str, ...]) -> Iterator[None]:
    """In the block, modules are looked for in these folders first, as ``python -m`` would; afterwards last.

    They stay on the path because a function of the method may import when it is called. They do not stay in front, where a
    file of the user's would stand before a library's module of the same name that this package imports later.
    """
    importlib.invalidate_caches()  # a file may have been written since the folder was last looked at
    before = list(sys.path)
    sys.path[:0] = folders
    try:
        yield
    finally:
        sys.path[:] = [*before, *(folder for folder in folders if folder not in before)]


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Method)


def _complete(method: Any, name: str, field: str) -> type[Method]:
    """The class. Raises UserError if something is missing without which no job could use it."""
    if not _is_method(method):
        rule, hint = "is no method", "make it a subclass of fleetune.methods.base.Method"
        raise UserError(rule, field=field, value=name, hint=hint)
    config = getattr(method, "Config", None)
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        hint = "write `Config = MyConfig` in it, with MyConfig a subclass of fleetune.methods.base.MethodConfig"
        raise UserError("has no Config, the class of its settings", field=field, value=name, hint=hint)
    if not isinstance(getattr(method, "source", None), str):
        hint = 'write `source = "what it does (authors, year)"` in it'
        raise UserError("has no source, the line for fleetune list methods", field=field, value=name, hint=hint)
    kind = config.model_fields["name"].annotation
    if get_origin(kind) is Literal and name not in get_args(kind):
        rule = f"its settings ({config.__name__}) allow only the name {get_args(kind)[0]!r}"
        raise UserError(rule, field=field, value=name, hint="give it a Config of its own, with `name: str`")
    return method
