"""What the code asks of its reader: files on the path of one round, import circles, sizes, comments, arrays with shapes.

    python benchmarks/code.py                    # this tree
    python benchmarks/code.py --at COMMIT        # an earlier one, for a comparison

The path of a round is found by running one: two rounds of jobs/methods/fedit.yaml, serially, with every call watched between a
round's begin and its record. A file is *on the path* if a function of it, called on that way, calls into another file of the
rooms that are asked about, and does not only call back whoever called it: it hands the round on, so its reader has to go on
too. A file that is only called is a leaf, and its name says what it gives; `models/`, `data/`, `fleet/` and `cost/` are what
the rooms build on, as PyTorch is. At the barest, the rooms are engine/, methods/ and training/, without what is recorded
(engine/checkpoint/, engine/pending_rounds.py, engine/round/rows.py) and started (engine/launch/); with costs and records,
these, pricing/ and records/ count too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BAREST = ("engine/", "methods/", "training/")
WITH_COSTS = (*BAREST, "pricing/", "records/")
# Rooms of the barest path that only record or start, under their present and their earlier names.
RECORDS = (
    "engine/checkpoint",
    "engine/pending_rounds.py",
    "engine/round/rows.py",
    "engine/ledger.py",
    "engine/private.py",
    "engine/columns.py",
)
STARTS = ("engine/launch",)
COSTS = ("engine/costs.py", "engine/tracing.py", "engine/costed.py")
ARRAYS = re.compile(r"\b(ndarray|Tensor|Tensors|Stack)\b")
SHAPE = re.compile(r"\((?:[A-Za-z0-9_*+ ]+,)+[^()]*\)|\([a-zA-Z]+,\)|\bscalar\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def package(tree: Path) -> Path:
    """Where the modules are."""
    return tree / "platform" / "fleetune"


def modules(tree: Path) -> dict[str, ast.Module]:
    """Path below the package -> its syntax tree."""
    files = sorted(package(tree).rglob("*.py"))
    return {f.relative_to(package(tree)).as_posix(): ast.parse(f.read_text(encoding="utf-8")) for f in files}


# -- the path of a round ----------------------------------------------------------------------------------------------------
def calls_of_a_round(tree: Path) -> dict[str, set[str]]:
    """File -> files that its functions call during a round, found in a process that runs the code of ``tree``."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(tree / "platform"), "FLEETUNE_CACHE": folder}
        command = [sys.executable, __file__, "--watch", str(tree), folder]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return {file: set(called) for file, called in json.loads(out.splitlines()[-1]).items()}


def watch(tree: Path, folder: Path) -> dict[str, list[str]]:
    """Run two short rounds and note who calls whom in the second, which is past everything that is done once."""
    import fleetune
    from fleetune.spec import load

    try:
        from fleetune.engine.launch.run import run
    except ImportError:  # a tree of before
        from fleetune.engine.launch import run  # type: ignore[no-redef, attr-defined]

    base = str(Path(fleetune.__file__).parent) + "/"
    calls: defaultdict[str, set[str]] = defaultdict(set)

    def file_of(frame: Any) -> str | None:
        name = frame.f_code.co_filename
        return name.removeprefix(base) if name.startswith(base) else None

    def profile(frame: Any, event: str, _: object) -> None:
        called, caller = file_of(frame), frame.f_back
        if event != "call" or called is None:
            return
        while caller is not None and file_of(caller) is None:
            caller = caller.f_back
        if caller is not None and (by := file_of(caller)) != called:
            calls[str(by)].add(called)

    def report(event: dict[str, Any]) -> None:
        sys.setprofile(profile if event["kind"] == "round" and event["round"] == 1 else None)

    short = {
        "rounds.num_rounds": 3,
        "rounds.clients_per_round": 4,
        "local.steps": 1,
        "data.num_eval_examples": 4,
        "evaluation.every": 3,
        "evaluation.generate": False,
        "execution.kind": "serial",
        "execution.cohort": 2,
        "execution.kernels": "torch",
        "tracking.enabled": False,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        run(load(tree / "jobs" / "methods" / "fedit.yaml", short), workspace=folder, report=report)
    return {file: sorted(called) for file, called in calls.items()}


def path(calls: dict[str, set[str]], is_inside: Callable[[str], bool]) -> list[str]:
    """The files that hand a round on (see above)."""
    found = []
    for file in sorted(filter(is_inside, calls)):
        on = {g for g in calls[file] if is_inside(g)}
        callers = {g for g in calls if file in calls[g]}
        if on - callers:
            found.append(file)
    return found


def is_barest(file: str) -> bool:
    """Whether a file belongs to the rooms of the barest path."""
    return file.startswith(BAREST) and not file.startswith((*RECORDS, *STARTS, *COSTS))


def is_costs_too(file: str) -> bool:
    """Whether it belongs to the rooms with costs and records."""
    return file.startswith(WITH_COSTS) and not file.startswith(STARTS)


# -- imports ------------------------------------------------------------------------------------------------------------------
def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """File -> files that it imports, at the top or in a function. What is for type checkers alone does not count."""
    known = {_dotted(file): file for file in trees}
    out: dict[str, set[str]] = {}
    for file, tree in trees.items():
        names: set[str] = set()
        for node in _running(tree.body):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
                }
            elif isinstance(node, ast.Import):
                names |= {a.name for a in node.names}
        out[file] = {known[name] for name in names if name in known} - {file}
    return out


def _dotted(file: str) -> str:
    return "fleetune." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _running(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _running(node.orelse)
        else:
            yield from ast.walk(node)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, directly or over others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for file in edges[todo.pop()] - seen:
                seen.add(file)
                todo.append(file)
        return seen

    reach = {file: reached(file) for file in edges}
    groups = {tuple(sorted(g for g in reach[file] if file in reach[g])) for file in edges if file in reach[file]}
    return [list(group) for group in sorted(groups)]


# -- sizes, comments, shapes ----------------------------------------------------------------------------------------------------
def functions(tree: ast.Module) -> list[Function]:
    """All functions and methods."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def lines_of(node: Function) -> int:
    """From its ``def`` to its last line."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def comment_lines(file: Path) -> int:
    """Lines that are a comment and nothing else."""
    with file.open("rb") as source:
        return sum(
            t.type == tokenize.COMMENT and t.line.strip().startswith("#") for t in tokenize.tokenize(source.readline)
        )


def docstring_lines(tree: ast.Module) -> int:
    """Lines of strings that stand by themselves: docstrings of modules, classes, functions and fields."""
    strings = (
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
    )
    return sum((n.end_lineno or n.lineno) - n.lineno + 1 for n in strings)


def array_functions(tree: ast.Module) -> tuple[int, int]:
    """Public functions that take or give arrays, and those of them whose docstring or signature comments say a shape."""
    num, told = 0, 0
    for node in functions(tree):
        args = [*node.args.args, *node.args.kwonlyargs]
        hints = [ast.unparse(a.annotation) for a in args if a.annotation] + (
            [ast.unparse(node.returns)] if node.returns else []
        )
        if node.name.startswith("_") or not any(ARRAYS.search(hint) for hint in hints):
            continue
        num += 1
        told += bool(SHAPE.search(ast.get_docstring(node) or ""))
    return num, told


def array_fields(tree: ast.Module, source: list[str]) -> tuple[int, int]:
    """Fields of classes that are arrays, and those whose own docstring, comment or line says a shape."""
    num, told = 0, 0
    for owner in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for node, after in zip(owner.body, [*owner.body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not ARRAYS.search(ast.unparse(node.annotation)):
                continue
            num += 1
            text = source[node.lineno - 1].partition("#")[2]
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text += str(after.value.value)
            told += bool(SHAPE.search(text))
    return num, told


def figures(tree: Path) -> list[tuple[str, str]]:
    """(what, how much) of a tree."""
    trees = modules(tree)
    base = package(tree)
    length = {file: len((base / file).read_text(encoding="utf-8").splitlines()) for file in trees}
    calls = calls_of_a_round(tree)
    barest, whole = path(calls, is_barest), path(calls, lambda f: is_costs_too(f) or f in COSTS)
    longest = max(trees, key=lambda file: length[file])
    sizes = [(lines_of(node), f"{file}: {node.name}") for file, one in trees.items() for node in functions(one)]
    comments = sum(comment_lines(base / file) for file in trees)
    docs = sum(docstring_lines(one) for one in trees.values())
    total = sum(length.values())
    taken = [array_functions(one) for one in trees.values()]
    held = [array_fields(one, (base / file).read_text(encoding="utf-8").splitlines()) for file, one in trees.items()]
    found = circles(imports(trees))
    rooms: defaultdict[str, int] = defaultdict(int)
    for file in trees:
        rooms[file.rpartition("/")[0]] += not file.endswith("__init__.py")
    largest = max(rooms, key=lambda room: rooms[room])
    return [
        ("a round at its barest, files", f"{len(barest)}, {sum(length[f] for f in barest)} lines: {', '.join(barest)}"),
        ("a round with costs and records", f"{len(whole)}, {sum(length[f] for f in whole)} lines: {', '.join(whole)}"),
        ("import circles", "; ".join(" <-> ".join(group) for group in found) or "0"),
        ("modules", f"{len(trees)}, {total} lines"),
        ("largest room", f"{largest}/, {rooms[largest]} files"),
        ("longest module", f"{longest}, {length[longest]} lines"),
        ("longest function", "{1}, {0} lines".format(*max(sizes))),
        ("functions above 60 lines", str(sum(size > 60 for size, _ in sizes))),
        ("comment lines", f"{comments / total:.1%}"),
        ("docstring lines", f"{docs / total:.1%}"),
        ("public functions on arrays with a shape", "{1} of {0}".format(*map(sum, zip(*taken, strict=True)))),
        ("fields that are arrays with a shape", "{1} of {0}".format(*map(sum, zip(*held, strict=True)))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", metavar="COMMIT", help="of this commit; default: the tree as it stands")
    parser.add_argument("--watch", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        print(json.dumps(watch(*args.watch)))
        return
    with contextlib.ExitStack() as stack:
        tree = ROOT
        if args.at:
            tree = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tree"
            subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), args.at], cwd=ROOT, check=True)
            stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
        for what, value in figures(tree.resolve()):
            print(f"{what:<42} {value}")


if __name__ == "__main__":
    main()
