"""Expands a sweep into trials: each a job with every ``auto`` decided, checked before any of them starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.engine.launch.directories import slug
from fleetune.engine.launch.resolve import resolve_execution
from fleetune.errors import UserError
from fleetune.records.naming import filled_fields, shown
from fleetune.seeds import rng
from fleetune.spec import RunSpec, from_dict
from fleetune.sweep.config import MAX_TRIALS, Distribution, SweepSpec


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    overrides: dict[str, Any]
    spec: RunSpec


def sweep_id(sweep: SweepSpec) -> str:
    """Name of the sweep's directory: the same for the same trials, so that a second launch finds it, also with other claims."""
    content = sweep.model_dump(mode="json", exclude={"name", "max_concurrent", "claims"})
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{slug(str(sweep.name))}-{digest}"


def trials_of(sweep: SweepSpec) -> list[Trial]:
    """All trials of a grid or random search. A combination that gives the same results as an earlier one is left out."""
    trials: list[Trial] = []
    hashes: set[str] = set()
    for overrides in _combinations(sweep):
        spec = checked(sweep, overrides, number=len(trials))
        if spec.spec_hash not in hashes:
            hashes.add(spec.spec_hash)
            trials.append(Trial(len(trials), overrides, spec))
    return trials


def checked(sweep: SweepSpec, overrides: Mapping[str, Any], *, number: int) -> RunSpec:
    """The job of a trial. Raises UserError with the field and the trial's overrides if it is not valid."""
    try:
        return decided(from_dict(sweep.base, overrides))
    except UserError as error:
        raise in_trial(error, number, overrides) from None


def decided(spec: RunSpec) -> RunSpec:
    """The spec with every ``auto`` decided: one process of one thread on the CPU, unless the trial asks for more.

    The decision must not depend on the machine: cohorts and threads are part of a run's identity.
    """
    execution = spec.execution
    workers = 1 if execution.workers == "auto" else int(execution.workers)
    threads = 1 if execution.threads == "auto" else int(execution.threads)
    sized = execution.model_copy(update={"workers": workers, "threads": threads})
    gpus = [workers] if execution.device == "cuda" else None
    spec = resolve_execution(
        spec.model_copy(update={"execution": sized}), node_cores=[workers * threads], node_gpus=gpus
    )
    kind = "ray" if spec.execution.kind == "ray" and workers > 1 else "serial"
    return spec.model_copy(update={"execution": spec.execution.model_copy(update={"kind": kind})})


def in_trial(error: UserError, number: int, overrides: Mapping[str, Any]) -> UserError:
    """The error with the trial in which it occurred."""
    changes = label(overrides)
    rule = f"{error.rule} [trial {number}: {changes}]" if changes else error.rule
    return UserError(rule, field=error.field, value=error.value, hint=error.hint)


def label(overrides: Mapping[str, Any]) -> str:
    """A trial's overrides in a line."""
    return ", ".join(f"{field}={shown(value)}" for field, value in filled_fields(overrides).items())


def _combinations(sweep: SweepSpec) -> Iterator[dict[str, Any]]:
    """Overrides of every trial; the seeds vary fastest."""
    seeds: list[dict[str, Any]] = [{"seed": seed} for seed in sweep.seeds] if sweep.seeds else [{}]
    if sweep.search is not None:
        if sweep.search.num_trials * len(seeds) > MAX_TRIALS:
            rule = f"times {len(seeds)} seeds are more than {MAX_TRIALS} trials"
            raise UserError(rule, field="search.num_trials", value=sweep.search.num_trials, hint="lower it")
        for index in range(sweep.search.num_trials):
            generator = rng(sweep.search.seed, "search", index)
            drawn = {field: draw(space, generator) for field, space in sweep.search.space.items()}
            yield from ({**drawn, **seed} for seed in seeds)
        return
    grid = sweep.grid or {}
    num_trials = math.prod(len(values) for values in grid.values()) * len(seeds)
    if num_trials > MAX_TRIALS:
        raise UserError(f"has {num_trials} combinations, more than {MAX_TRIALS}", field="grid", hint="use a search")
    for values in itertools.product(*grid.values()):
        yield from ({**dict(zip(grid, values, strict=True)), **seed} for seed in seeds)


def draw(space: Distribution, generator: np.random.Generator) -> Any:
    """One value of a searched field."""
    if space.uniform is not None:
        return float(generator.uniform(*space.uniform))
    if space.loguniform is not None:
        low, high = (math.log(end) for end in space.loguniform)
        return float(math.exp(generator.uniform(low, high)))
    if space.randint is not None:
        low, high = space.randint
        return int(generator.integers(low, high, endpoint=True))
    assert space.choice is not None
    return space.choice[int(generator.integers(len(space.choice)))]
