"""Proves that a change changes nothing: what short runs of every method left behind before it, and what they leave now.

python tests/golden.py record /tmp/before --at HEAD~3    # or without --at: as the tree stands
python tests/golden.py check /tmp/before                 # exit status 1 and the first differences, if there are any

A recording holds, for each case of `golden_cases.py`: a digest of every tensor of the state, of what clients keep and of the
shipped adapter; the rows of rounds.parquet and clients.parquet, the result and the timeline but for real seconds; and the
job's plan. Bits depend on the processor and on PyTorch, so a recording is good only where it was made.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from golden_cases import ADDED, FIELDS, GONE, RENAMED, Settings, cases

ROOT = Path(__file__).resolve().parent.parent
REAL = {"wall_seconds", "run_id", "run_dir", "git_commit"}
"""Names of what is never the same twice."""
MAX_SHOWN = 12

Facts = dict[str, Any]


def machine() -> dict[str, str]:
    """What bits depend on beside the code."""
    import platform

    import numpy
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(models)) or platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


# -- running: in a process of its own, with the tree that is asked for ------------------------------------------------------
def run_all(tree: Path, wanted: Mapping[str, tuple[str, Settings]]) -> dict[str, Facts]:
    """The facts of every case, as the code in ``tree`` makes them."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        environment = {**os.environ, "PYTHONPATH": str(tree / "platform"), "FLEETUNE_CACHE": f"{folder}/cache"}
        (Path(folder) / "cases.json").write_text(json.dumps(wanted))
        command = [sys.executable, __file__, "inside", folder, str(tree)]
        subprocess.run(command, env=environment, cwd=folder, check=True)
        return json.loads((Path(folder) / "facts.json").read_text())


def inside(folder: Path, tree: Path) -> None:
    """Run the cases one after the other, so that those on Ray share one cluster."""
    import fleetune

    assert Path(fleetune.__file__).is_relative_to(tree), "another fleetune stands before the one that is asked for"
    known = _known_fields()
    facts = {}
    for number, (name, (method, settings)) in enumerate(json.loads((folder / "cases.json").read_text()).items()):
        job = tree / "jobs" / "methods" / f"{method}.yaml"
        if not job.exists():  # a method that came later
            continue
        given = [f"--set={_field(path, known)}={_typed(value)}" for path, value in settings.items()]
        workspace = folder / f"case-{number}"
        print(name, file=sys.stderr, flush=True)
        result = _fleetune("run", job, *given, "-w", workspace, "--json")
        facts[name] = {
            **facts_of(next((workspace / "runs").iterdir())),
            "result": _plain(result),
            "plan": _plain(_fleetune("plan", job, *given, "--json")),
        }
        shutil.rmtree(workspace)
    (folder / "facts.json").write_text(json.dumps(facts))


def _fleetune(*arguments: object) -> Any:
    """A command's JSON document."""
    from fleetune import cli

    sys.argv = ["fleetune", *map(str, arguments)]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            cli.main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"fleetune {' '.join(map(str, arguments))} ended with {end.code}") from None
    return json.loads(out.getvalue().splitlines()[-1])


def _known_fields() -> set[str]:
    """Names of all fields of the job file."""
    from fleetune.spec import json_schema

    schema = json_schema()
    return {name for part in [schema, *schema["$defs"].values()] for name in part.get("properties", {})}


def _typed(value: Any) -> str:
    """A value as it is typed on the command line: text without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _field(path: str, known: set[str]) -> str:
    """A field under the name that the tree has for it."""
    for new, old in FIELDS:
        if path == new and new.rpartition(".")[2] not in known:
            return old
    return path


# -- what a run left behind -------------------------------------------------------------------------------------------------
def facts_of(run_dir: Path) -> Facts:
    """All that must be the same again."""
    import pyarrow.parquet as pq

    tables = {name: pq.read_table(run_dir / f"{name}.parquet").to_pydict() for name in ("rounds", "clients")}
    timeline = json.loads((run_dir / "trace.json").read_text())
    events = timeline["traceEvents"] if isinstance(timeline, dict) else timeline
    return {
        "tensors": _digests(run_dir / "checkpoint"),
        "adapter": _digests(run_dir / "adapter"),
        **{name: _plain({key: _from_first(key, column) for key, column in t.items()}) for name, t in tables.items()},
        "timeline": [[event.get("ph"), event.get("ts"), event.get("dur")] for event in events],
    }


def _digests(folder: Path) -> dict[str, list[str]]:
    """Name -> form and digest of every tensor in a folder. Files are not named: how a checkpoint is cut up may change."""
    from safetensors.numpy import load_file

    found: dict[str, list[str]] = {}
    for path in folder.rglob("*.safetensors"):
        for name, array in load_file(path).items():
            digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
            found.setdefault(name, []).append(f"{array.dtype} {array.shape} {digest}")
    return {name: sorted(tensors) for name, tensors in found.items()}


def _from_first(name: str, column: list[Any]) -> list[Any]:
    """Rounds are counted from the first, whatever its number is."""
    return [value - min(column) for value in column] if name == "round" and column else column


def _plain(value: Any) -> Any:
    """Without real seconds, and with what JSON does not have as words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items() if key not in REAL}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# -- comparing --------------------------------------------------------------------------------------------------------------
def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Where two values differ, the earlier one's names read as they are called now."""
    if isinstance(before, dict) and isinstance(after, dict):
        before = {RENAMED.get(key, key): value for key, value in before.items() if key not in GONE}
        for key in [*before, *(key for key in after if key not in before and key not in ADDED)]:
            if key not in before or key not in after:
                yield f"{where}{key}: {'is new' if key not in before else 'is missing'}"
            else:
                yield from differences(before[key], after[key], f"{where}{key} / ")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{where}{i} / ")
    elif before != after:
        yield f"{where.removesuffix(' / ')}: was {str(before)[:120]}, is {str(after)[:120]}"


def record(folder: Path, wanted: Mapping[str, tuple[str, Settings]], *, at: str | None) -> None:
    """Write a recording of this tree, or of a commit's."""
    folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", at or "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    with _tree(at) as tree:
        facts = run_all(tree, wanted)
    content = {"machine": machine(), "commit": commit.stdout.strip(), "cases": facts}
    (folder / "golden.json").write_text(json.dumps(content))
    print(f"{len(facts)} cases are recorded in {folder}")


@contextlib.contextmanager
def _tree(commit: str | None) -> Iterator[Path]:
    """The tree of a commit, for as long as it is needed."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="golden-tree-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            yield tree.resolve()
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def check(folder: Path, wanted: Mapping[str, tuple[str, Settings]]) -> int:
    """Compare this tree with a recording; the number of cases that differ."""
    recorded = json.loads((folder / "golden.json").read_text())
    if recorded["machine"] != machine():
        sys.exit(
            f"recorded on {recorded['machine']}, this is {machine()}: record it here with --at {recorded['commit']}"
        )
    wanted = {name: case for name, case in wanted.items() if name in recorded["cases"]}
    facts = run_all(ROOT, wanted)
    num_different = 0
    for name in wanted:
        found = list(differences(recorded["cases"][name], facts[name]))
        num_different += bool(found)
        print(f"{name}: {'the same' if not found else f'{len(found)} differences'}")
        for line in found[:MAX_SHOWN]:
            print(f"  {line}")
    print(f"{len(wanted)} cases, {num_different} of them differ from {recorded['commit'][:12]}")
    return num_different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "check"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("--only", help="cases whose name holds this word")
        if name == "record":
            command.add_argument("--at", metavar="COMMIT", help="from this commit; default: the tree as it stands")
    hidden = commands.add_parser("inside")
    hidden.add_argument("folder", type=Path)
    hidden.add_argument("tree", type=Path)
    args = parser.parse_args()
    if args.command == "inside":
        inside(args.folder, args.tree)
        return 0
    wanted = {name: case for name, case in cases().items() if args.only is None or args.only in name}
    if args.command == "record":
        record(args.folder, wanted, at=args.at)
        return 0
    return int(check(args.folder, wanted) > 0)


if __name__ == "__main__":
    sys.exit(main())
