"""Records: the run directory, and what is made from it (MLflow, trace, figures, report)."""

from fleetune.records.run_directory import RunDirectory, find_runs
from fleetune.records.sweep_directory import SweepDirectory

__all__ = ["RunDirectory", "SweepDirectory", "find_runs"]
