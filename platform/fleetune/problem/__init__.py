"""A run's inputs, read and checked before any work begins, with digests of all that was read."""

from fleetune.problem.problem import (
    EvalSet,
    Inputs,
    Problem,
    base_from_arrays,
    base_to_arrays,
    build_problem,
    context_of,
    load_inputs,
    set_threads,
)

__all__ = [
    "EvalSet",
    "Inputs",
    "Problem",
    "base_from_arrays",
    "base_to_arrays",
    "build_problem",
    "context_of",
    "load_inputs",
    "set_threads",
]
