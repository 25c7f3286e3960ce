"""Records: the directory of a run or sweep, which is the truth about it, and its tables and timeline."""

from fleetune.records.find import find_runs
from fleetune.records.run_directory import RunDirectory
from fleetune.records.sweep_directory import SweepDirectory

__all__ = ["RunDirectory", "SweepDirectory", "find_runs"]
