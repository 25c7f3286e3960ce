"""What an MLflow store holds of a run, and what it should hold."""

from __future__ import annotations

from fleetune.records import RunDirectory
from fleetune.tracking.metrics import RoundMetrics, of_baseline


def steps(uri: str, mlflow_run_id: str) -> dict[str, list[int]]:
    """Metric -> the steps the store holds, each as often as it holds it."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    keys = client.get_run(mlflow_run_id).data.metrics
    return {key: sorted(m.step for m in client.get_metric_history(mlflow_run_id, key)) for key in keys}


def expected_steps(run: RunDirectory) -> dict[str, list[int]]:
    """Metric -> the steps that a store should hold: the untrained model at 0, the rounds from 1."""
    metrics, found = RoundMetrics(), {key: [0] for key in of_baseline(run.meta.get("baseline", {}))}
    for row, _ in run.round_rows():
        for key in metrics.of(row):
            found.setdefault(key, []).append(row["round"])
    return found
