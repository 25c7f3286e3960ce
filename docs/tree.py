"""What lies where: the rooms for the README, and every file for docs/design/tree.md, from the files' own first sentences."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP = {
    "pyproject.toml": "dependencies, settings of tests and linters",
    "Makefile": "quickstart, test, lint, docs, bench",
    "platform/": "root of the sources; no package itself",
    "jobs/": "job files: the quickstart, one per method, sweeps, papers' settings; the job that trained micro-llama",
    "cluster/": "Ray on your machines, EC2, Kubernetes, Slurm; MLflow on PostgreSQL and S3; their README.md",
    "docs/": "documentation: index.md",
    "tests/": "tests, in folders that mirror the package; golden.py: two commits that should give the same bits",
    "benchmarks/": "measurements of the engine; readability.py: what the code asks of its reader",
}
"""The first level of the README's tree, in its order."""

FOLDERS = {
    **TOP,
    "platform/fleetune/": "the package; the files beside its rooms are what every room uses",
    "platform/fleetune/reports/templates/": "the HTML, CSS and script that all pages share",
    "platform/fleetune/assets/": "the built-in model",
    "jobs/methods/": "one job per method",
    "jobs/sweeps/": "sweeps: one question each",
    "jobs/paper/": "papers' settings, whose costs are compared with what the papers say; papers' studies as sweeps",
    "jobs/real/": "jobs on pretrained models and published data",
    "cluster/kubernetes/": "KubeRay's manifests",
    "cluster/mlflow/": "the MLflow container's command",
    "cluster/ray/": "clusters for `ray up`",
    "docs/guides/": "do something",
    "docs/reference/": "look something up: job file, tables, costs, devices, glossary",
    "docs/methods/": "one page per method",
    "docs/results/": "what runs have found, with their commands: comparisons, verdicts on papers' claims",
    "docs/design/": "how it is built, and why",
    "benchmarks/peers/": "the same work under Flower, pfl-research and a plain loop",
}
"""Folders that are no package, so that no docstring speaks for them."""

SHOWN = (".py", ".c", ".h", ".yaml", ".sh")
"""The kinds of files that docs/design/tree.md lists. Templates and weights are described by their folder."""

PAGE = """\
# Every file

<!-- Written by docs/generate.py from the files' first sentences. Do not edit: run `make docs`. -->

Each file with its own first sentence. The [architecture](architecture.md) says how they work together, and the
[README](../../README.md) lists the folders alone.

```
{tree}
```
"""


def tree_page() -> str:
    """The page with every file."""
    rooms = ("platform", "jobs", "cluster", "tests", "benchmarks")
    return PAGE.format(tree="\n".join(line for room in rooms for line in _entries(ROOT / room, 0, is_full=True)))


def readme() -> str:
    """The README with its tree as it should be; the rest as it stands."""
    lines = []
    for name, what in TOP.items():
        lines += _line(name, what, 0)
        if name in ("platform/", "docs/", "jobs/"):
            lines += _below(ROOT / name, 1, is_full=False)
    before, heading, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What is where\n\n```\n")
    return before + heading + "\n".join(lines) + "\n```" + rest.partition("\n```")[2]


def _entries(folder: Path, depth: int, *, is_full: bool) -> list[str]:
    """A folder and what lies in it."""
    path = folder.relative_to(ROOT).as_posix() + "/"
    what = FOLDERS.get(path) or sentence(folder / "__init__.py")
    return [*_line(folder.name + "/", what, depth), *_below(folder, depth + 1, is_full=is_full)]


def _below(folder: Path, depth: int, *, is_full: bool) -> list[str]:
    """What lies in a folder: its files, where all are shown, and then its folders."""
    children = sorted(folder.iterdir())
    lines: list[str] = []
    for file in children:
        if is_full and file.suffix in SHOWN and file.name != "__init__.py":
            lines += _line(file.name, sentence(file), depth)
    for child in children:
        is_room = (child / "__init__.py").is_file() or f"{child.relative_to(ROOT).as_posix()}/" in FOLDERS
        if child.is_dir() and (is_room or (is_full and any(child.glob("*.py")))):
            lines += _entries(child, depth, is_full=is_full)
    return lines


def _line(name: str, what: str, depth: int) -> list[str]:
    """A line of the tree, with what is too long for it below, under its beginning."""
    start = f"{'  ' * depth}{name}"
    start = f"{start:<27} " if what else start
    return textwrap.wrap(
        what, width=120, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    ) or [start]


def sentence(file: Path) -> str:
    """The first sentence of a file: of its docstring, or of the comment at its top."""
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = re.sub(r"(?m)^#(?:!|SBATCH|include).*\n|^\s*\n", "", text)
        comment = re.match(r"/\*([\s\S]*?)\*/|((?:#.*\n)+)", text)
        text = re.sub(r"(?m)^\s*[*#] ?", "", comment[1] or comment[2]) if comment else ""
        text = re.split(r"\n {2,}", text)[0]  # commands, which are indented
    first = " ".join(text.strip().partition("\n\n")[0].split()).replace("``", "`")
    return re.split(r"(?<=\w\w\.)\s+(?=[A-Za-z`(])|(?<=[)`\]]\.)\s+", first)[0].rstrip(".:")
