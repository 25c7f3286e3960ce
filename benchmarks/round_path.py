"""The files on the path of one round, found by running two rounds of jobs/methods/fedit.yaml serially and watching every call.

A file is *on the path* if one of its functions, called between a round's begin and its record, calls into another file of the
rooms that are asked about, and does not only call back its own caller: it hands the round on, so its reader has to go on too.
A file that is only called is a leaf, and its name says what it gives. `models/`, `data/`, `fleet/` and `cost/` are what the rooms
build on, as PyTorch is.

At the barest, the rooms are engine/, methods/ and training/, without the files that record (engine/checkpoint/,
engine/pending_rounds.py, engine/rows.py) and start (engine/launch/). With costs and records, these files, pricing/ and records/
count too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAREST = ("engine/", "methods/", "training/")
WITH_COSTS = (*BAREST, "pricing/", "records/")
# Files of these rooms that only record, start or cost, under their present and their earlier names.
RECORDS = (
    "engine/checkpoint",
    "engine/pending_rounds.py",
    "engine/rows.py",
    "engine/ledger.py",
    "engine/private.py",
    "engine/columns.py",
)
STARTS = ("engine/launch",)
COSTS = ("engine/costs.py", "engine/tracing.py", "engine/costed.py")


def calls_of_a_round(tree: Path) -> dict[str, set[str]]:
    """File -> files that its functions call during a round, found in a process that runs the code of ``tree``."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(tree / "platform"), "FLEETUNE_CACHE": folder}
        command = [sys.executable, __file__, str(tree), folder]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return {file: set(called) for file, called in json.loads(out.splitlines()[-1]).items()}


def watch(tree: Path, folder: Path) -> dict[str, list[str]]:
    """Run two short rounds and note who calls whom in the second, which is past everything that is done once."""
    import fleetune
    from fleetune.spec import load

    try:
        from fleetune.engine.launch.run import run
    except ImportError:  # an earlier tree
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
    """The files that hand a round on (see the top of this file), of those that are ``is_inside``."""
    found = []
    for file in sorted(filter(is_inside, calls)):
        called = {g for g in calls[file] if is_inside(g)}
        callers = {g for g in calls if file in calls[g]}
        if called - callers:
            found.append(file)
    return found


def is_barest(file: str) -> bool:
    """True for a file of the rooms of the barest path."""
    return file.startswith(BAREST) and not file.startswith((*RECORDS, *STARTS, *COSTS))


def is_costs_too(file: str) -> bool:
    """True for a file of the rooms with costs and records."""
    return file.startswith(WITH_COSTS) and not file.startswith(STARTS)


if __name__ == "__main__":
    print(json.dumps(watch(*map(Path, sys.argv[1:]))))
