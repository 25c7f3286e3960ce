"""Records: the run directory, and what is made from it (MLflow, trace, figures, report)."""

from fleetune.records.run_directory import RunDirectory, find_runs

__all__ = ["RunDirectory", "find_runs"]
