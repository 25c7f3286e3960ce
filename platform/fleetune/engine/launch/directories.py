"""A run's directory from outside: its name, its ``meta.json``, and the lock by which one process at a time runs it."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from fleetune import locks
from fleetune.errors import UserError
from fleetune.methods import METHODS
from fleetune.methods.find import code_path
from fleetune.problem import Problem
from fleetune.problem.content import identity
from fleetune.records.run_directory import RunDirectory


def run_meta(problem: Problem) -> dict[str, Any]:
    """The content of ``meta.json``: identity, data, models, and the version of the code."""
    spec, content = problem.job, problem.content
    dataset = {
        "name": problem.inputs.dataset_name,
        "source": spec.data.dataset,
        "digest": content.get("data.dataset"),
        "num_examples": len(problem.inputs.train),
        "num_eval_examples": len(problem.inputs.evaluation.data),
    }
    model = {"trained": spec.model.base, "costed": spec.cost.model or spec.model.base}
    # Where a method from outside was found, for `fleetune resume` from another folder.
    from_outside = {"code_path": list(code_path())} if spec.method.name not in METHODS else {}
    return {
        **from_outside,
        "spec_hash": spec.spec_hash,
        "identity": identity(spec, content),
        "content": content,
        "git_commit": git_commit(),
        "dataset": dataset,
        "model": model,
    }


def new_run_directory(problem: Problem, workspace: Path, meta: dict[str, Any]) -> RunDirectory:
    """A directory with a new name. Raises UserError if the workspace cannot be written to."""
    meta = {**run_meta(problem), **meta}
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(problem.job.name)}-{meta['identity'][:6]}"
    number = 1
    while (workspace / "runs" / run_id).exists():
        number += 1
        run_id = f"{run_id.removesuffix(f'-{number - 1}')}-{number}"
    with writable(workspace):
        return RunDirectory.create(workspace, run_id, problem.job.to_dict(), meta=meta)


@contextlib.contextmanager
def writable(workspace: Path) -> Iterator[None]:
    """Raises UserError if the workspace cannot be written to in the block."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot be written to: {error.strerror or error}",
            field="--workspace",
            value=str(workspace),
            hint="choose another with --workspace, or set FLEETUNE_WORKSPACE",
        ) from None


def slug(name: str) -> str:
    """A run's name in a form that may be part of a folder's name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name.lower())[:40]


def git_commit() -> str | None:
    """The commit of the repository that the working directory is in; None if it is in none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
        return out.stdout.strip() or None
    return None


@contextlib.contextmanager
def locked(run_dir: RunDirectory, *, field: str = "RUN_DIR", patience_seconds: float = 0.0) -> Iterator[None]:
    """Holds the directory's lock in the block, so that nobody else runs it. Raises UserError if another process does.

    ``patience_seconds``: how long to wait for it; a process that was killed may take a moment to die.
    """
    held = locks.locked(run_dir.path / "checkpoint" / "lock", patience_seconds=patience_seconds)
    try:
        held.acquire()
    except Timeout:
        raise UserError(
            "another process is running it", field=field, value=str(run_dir.path), hint="wait for it, or end it"
        ) from None
    try:
        yield
    finally:
        held.release()
