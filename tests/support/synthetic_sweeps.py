"""Plausible sweep directories for tests of reports: no model is trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.records import RunDirectory, SweepDirectory
from fleetune.records.naming import filled_fields
from support.synthetic_runs import make_spec, rounds_of

BASELINE = {"eval_loss": 2.1, "eval_accuracy": 0.2}


def make_sweep(
    workspace: Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    name: str = "growth",
    num_rounds: int = 6,
    num_clients: int = 6,
    failed: Sequence[int] = (),
    gain: Callable[[Mapping[str, Any]], float] = lambda overrides: 1.0,
    cost: Callable[[Mapping[str, Any]], float] = lambda overrides: 1.0,
    evaluate: bool = True,
    claims: Sequence[Mapping[str, Any]] = (),
) -> SweepDirectory:
    """A sweep over ``grid``, all trials finished but those in ``failed``, which have no run.

    ``gain`` scales how far a trial's accuracy rises above the untrained 20 %, ``cost`` its time, bytes and energy.
    """
    values = {"name": name, "base": make_spec(), "grid": {k: list(v) for k, v in grid.items()}, "claims": list(claims)}
    sweep = SweepDirectory.create(workspace, f"{name}-0", values, directory=workspace / "sweeps")
    rows = []
    for number, chosen in enumerate(itertools.product(*grid.values())):
        overrides = dict(zip(grid, chosen, strict=True))
        row = {"trial": number, "method": overrides.get("method.name", "devft"), "seed": overrides.get("seed", 0)}
        row |= {"overrides": overrides, "status": "failed", "error": "client 3, round 1: the loss is <nan>"}
        if number not in failed:
            run = _trial(workspace, f"{name}-t{number}", overrides, num_rounds, num_clients, evaluate)
            _rescale(run, gain(overrides), cost(overrides))
            row |= {"status": "finished", "error": None, "run_id": run.run_id, "run_dir": run.path, **_finals(run)}
        rows.append(row)
    sweep.write_trials(rows)
    return sweep


def make_study(
    workspace: Path,
    grid: Mapping[str, Sequence[Any]],
    claims: Sequence[Mapping[str, Any]],
    result: Callable[[Mapping[str, Any]], Mapping[str, Any] | None],
    *,
    seeds: Sequence[int] = (0, 1, 2),
) -> SweepDirectory:
    """A sweep that is its table alone, without runs: what claims are decided from.

    ``result`` gives a trial's columns of ``trials.parquet`` from the dotted fields that it sets, its seed among them; None:
    the trial failed.
    """
    values = {"name": "study", "base": make_spec(), "grid": {k: list(v) for k, v in grid.items()}, "seeds": list(seeds)}
    values["claims"] = list(claims)
    sweep = SweepDirectory.create(workspace, "study-0", values, directory=workspace / "sweeps")
    rows = []
    for number, (*chosen, seed) in enumerate(itertools.product(*grid.values(), seeds)):
        overrides = {**dict(zip(grid, chosen, strict=True)), "seed": seed}
        columns = result(filled_fields(overrides))
        row = {"trial": number, "run_id": f"study-{number}", "seed": seed, "overrides": overrides}
        rows.append({**row, "status": "failed" if columns is None else "finished", **(columns or {})})
    sweep.write_trials(rows)
    return sweep


def _trial(
    workspace: Path, run_id: str, overrides: Mapping[str, Any], num_rounds: int, num_clients: int, evaluate: bool
) -> RunDirectory:
    method = overrides.get("method.name", "devft")
    spec = make_spec(method=method, seed=overrides.get("seed", 0), num_rounds=num_rounds, num_clients=num_clients)
    spec["evaluation"]["every"] = 1
    meta = {"baseline": BASELINE, "overrides": filled_fields(overrides), "sweep": "growth"}
    run = RunDirectory.create(workspace, run_id, spec, meta=meta if evaluate else {})
    for row, clients in rounds_of(spec, evaluate=evaluate):
        run.append_round(row, clients)
    run.consolidate()
    return run


def _rescale(run: RunDirectory, gain: float, cost: float) -> None:
    import pandas as pd
    import pyarrow as pa

    for name in ("rounds.parquet", "clients.parquet"):
        table = pd.read_parquet(run.path / name)
        for column in table.columns.intersection(["sim_seconds", "uplink_bytes", "downlink_bytes", "energy_joules"]):
            table[column] = (table[column] * cost).astype(table[column].dtype)
        if "eval_accuracy" in table:
            table["eval_accuracy"] = 0.2 + gain * (table["eval_accuracy"] - 0.2)
        run._write_parquet(name, pa.Table.from_pandas(table, preserve_index=False))


def _finals(run: RunDirectory) -> dict[str, float]:
    rounds = run.rounds()
    last = ["train_loss", "eval_loss", "eval_accuracy", "sim_seconds"]
    sums = ["uplink_bytes", "downlink_bytes", "energy_joules", "num_oom", "num_dropped", "num_late"]
    finals = {**{name: float(rounds[name].iloc[-1]) for name in last}, **{n: float(rounds[n].sum()) for n in sums}}
    untrained = {f"baseline_{name}": value for name, value in run.meta.get("baseline", {}).items()}
    return {"num_rounds": len(rounds), **finals, **untrained}
