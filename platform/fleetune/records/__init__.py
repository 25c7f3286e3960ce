"""Records: the run directory, and what is made from it (MLflow, trace, figures, report)."""

from fleetune.records.find import find_runs
from fleetune.records.run_directory import RunDirectory
from fleetune.records.sweep_directory import SweepDirectory

__all__ = ["RunDirectory", "SweepDirectory", "find_runs"]
