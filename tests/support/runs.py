"""Runs of the tiny world inside this process: those of the checks that every method passes."""

from __future__ import annotations

from fleetune.check.runs import (
    Finished,
    MakeExecutor,
    Passed,
    Recorder,
    base_model,
    begun,
    close_tensors,
    finished,
    inputs,
    problem,
    recorded,
    run,
    same_runs,
    same_tensors,
    worker,
)

__all__ = [
    "Finished",
    "MakeExecutor",
    "Passed",
    "Recorder",
    "base_model",
    "begun",
    "close_tensors",
    "finished",
    "inputs",
    "problem",
    "recorded",
    "run",
    "same_runs",
    "same_tensors",
    "worker",
]
