"""Stores the adapter of a finished run in a library, with what it was trained on and how good it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fleetune import files
from fleetune.engine.launch.directories import writable
from fleetune.errors import RunFailed, UserError
from fleetune.models.library import SKILL
from fleetune.models.peft_format import CONFIG, OWN_CONFIG, WEIGHTS
from fleetune.models.skill_file import write_skill_file
from fleetune.problem import Problem
from fleetune.records.run_directory import RunDirectory


def check_place(library: Path, name: str) -> Path:
    """The adapter's folder, ``library/name``. Raises UserError if it is no folder's name, or if something is there already."""
    if name in ("", "adapter") or name.startswith(".") or Path(name).name != name:
        rule = "is no name for a folder of a library: one without / that begins with no dot, and not adapter"
        raise UserError(rule, field="--name", value=name, hint="choose another with --name")
    folder = library.absolute() / name
    if folder.exists():
        hint = "choose another name with --name, or remove the folder"
        raise UserError("is there already", field="--library", value=str(folder), hint=hint)
    return folder


def check_pairs(problem: Problem) -> None:
    """Raises UserError if the method ships something else than pairs of factors, which a library cannot hold."""
    from fleetune.models.adapters import is_pair
    from fleetune.models.peft_format import as_pairs

    method = problem.method
    shipped = method.deployed(method.start(), lambda: iter(()))  # nobody has private tensors yet
    held = as_pairs({**shipped.adapter, **shipped.model.held}, scaling=problem.spec.model.lora.scaling)
    if not all(is_pair(name) for name in held):
        raise UserError(
            "ships more than pairs of factors, and an adapter of a library is made of these alone",
            field="method.name",
            value=problem.spec.method.name,
            hint="train a plain adapter, with centralized or fedit",
        )


def store(run_dir: RunDirectory, folder: Path) -> dict[str, Any]:
    """Copy a finished run's adapter to ``folder`` and write `SKILL` beside it; returns what that file says.

    It holds nothing of when or where the run was: the same job gives the same file, and so the same identity to a job that
    composes it.
    """
    result, source = run_dir.result() or {}, run_dir.path / "adapter"
    if result.get("status") != "finished":
        raise RunFailed(f"{run_dir.path} has not finished: go on with fleetune resume {run_dir.path}")
    run_dir.check()
    if (source / OWN_CONFIG).is_file() or not (source / CONFIG).is_file():
        rule = "its adapter is made of more than pairs of factors, and a library cannot hold it"
        raise UserError(rule, field="RUN_DIR", value=str(run_dir.path), hint="train a plain adapter, with fedit, say")
    facts = facts_of(run_dir, result.get("metrics", {}))
    with writable(folder):
        folder.mkdir(parents=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, folder / name)
        write_skill_file(folder, facts)
        files.sync(folder / name for name in (CONFIG, WEIGHTS, SKILL))
    return facts


def facts_of(run_dir: RunDirectory, metrics: dict[str, Any]) -> dict[str, Any]:
    """Base, rank, targets, skill, data and quality of a finished run's adapter, as plain data."""
    spec, meta = run_dir.spec, run_dir.meta
    data, lora = spec["data"], spec["model"]["lora"]
    prefix = "model.base/"
    weights = {
        part.removeprefix(prefix): digest
        for part, digest in (meta.get("content") or {}).items()
        if part.startswith(prefix) and part.endswith(".safetensors")
    }
    quality = {
        "eval_loss": metrics.get("eval_loss"),
        "untrained_loss": metrics.get("baseline_eval_loss"),
        "eval_accuracy": metrics.get("eval_accuracy"),
        "untrained_accuracy": metrics.get("baseline_eval_accuracy"),
    }
    return {
        "skill": "+".join(data.get("skills") or ()) or spec["name"],
        "base": spec["model"]["base"],
        "base_weights": weights,
        "rank": lora["rank"],
        "targets": lora["targets"],
        "data": data["dataset"],
        "dataset": meta.get("dataset"),
        "method": spec["method"]["name"],
        "num_rounds": spec["rounds"]["num_rounds"],
        "seed": spec["seed"],
        "quality": {name: value for name, value in quality.items() if value is not None},
    }
