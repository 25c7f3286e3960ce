"""The part of a job file that is about MLflow."""

from __future__ import annotations

from pydantic import field_validator

from fleetune.config import Config
from fleetune.tracking.access import check_no_secret


class TrackingConfig(Config):
    """Where results go besides the run directory."""

    enabled: bool = True
    """Whether to send results to MLflow while the run goes on; ``fleetune sync`` can do it later."""
    uri: str | None = None
    """MLflow's tracking URI; null: an SQLite store in the workspace. Credentials belong in
    MLFLOW_TRACKING_USERNAME/_PASSWORD: an address that holds any is refused.
    """
    experiment: str | None = None
    """MLflow experiment; null: the sweep's name, or the job's."""
    system_metrics: bool = False
    """Whether processor, memory, disk and network of the command's machine are sent along with every round."""

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        check_no_secret(value)
        return value
