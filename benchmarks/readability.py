"""What the code asks of its reader: files on the path of one round, import circles, sizes, comments, arrays with shapes.

    python benchmarks/readability.py                    # this tree
    python benchmarks/readability.py --at COMMIT        # an earlier one, for a comparison

The path of a round is found by running one: round_path.py says how, and which files count.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import subprocess
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from round_path import COSTS, calls_of_a_round, is_barest, is_costs_too, path

ROOT = Path(__file__).resolve().parent.parent
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


# -- imports ------------------------------------------------------------------------------------------------------------------
def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """File -> files that it imports, at the top or in a function. Imports for type checkers alone do not count."""
    files = {_dotted(file): file for file in trees}
    out: dict[str, set[str]] = {}
    for file, tree in trees.items():
        names: set[str] = set()
        for node in _running(tree.body):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in files else node.module for a in node.names
                }
            elif isinstance(node, ast.Import):
                names |= {a.name for a in node.names}
        out[file] = {files[name] for name in names if name in files} - {file}
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
    num, num_with_shape = 0, 0
    for node in functions(tree):
        args = [*node.args.args, *node.args.kwonlyargs]
        hints = [ast.unparse(a.annotation) for a in args if a.annotation] + (
            [ast.unparse(node.returns)] if node.returns else []
        )
        if node.name.startswith("_") or not any(ARRAYS.search(hint) for hint in hints):
            continue
        num += 1
        num_with_shape += bool(SHAPE.search(ast.get_docstring(node) or ""))
    return num, num_with_shape


def array_fields(tree: ast.Module, source: list[str]) -> tuple[int, int]:
    """Fields of classes that are arrays, and those whose own docstring, comment or line says a shape."""
    num, num_with_shape = 0, 0
    for owner in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for node, after in zip(owner.body, [*owner.body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not ARRAYS.search(ast.unparse(node.annotation)):
                continue
            num += 1
            text = source[node.lineno - 1].partition("#")[2]
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text += str(after.value.value)
            num_with_shape += bool(SHAPE.search(text))
    return num, num_with_shape


def figures(tree: Path) -> list[tuple[str, str]]:
    """(name of a figure, its value) of a tree."""
    trees = modules(tree)
    base = package(tree)
    length = {file: len((base / file).read_text(encoding="utf-8").splitlines()) for file in trees}
    calls = calls_of_a_round(tree)
    barest, with_costs = path(calls, is_barest), path(calls, lambda f: is_costs_too(f) or f in COSTS)
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
        (
            "a round with costs and records",
            f"{len(with_costs)}, {sum(length[f] for f in with_costs)} lines: {', '.join(with_costs)}",
        ),
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
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        tree = ROOT
        if args.at:
            tree = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tree"
            subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), args.at], cwd=ROOT, check=True)
            stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
        for name, value in figures(tree.resolve()):
            print(f"{name:<42} {value}")


if __name__ == "__main__":
    main()
