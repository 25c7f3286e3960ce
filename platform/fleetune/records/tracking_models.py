"""What came out of a run, in MLflow's terms: the adapter as a logged model, which names its run, base model and data."""

from __future__ import annotations

from typing import Any

from fleetune.records.naming import flatten, method_of, run_name, shown
from fleetune.records.run_directory import RunDirectory

TOLD = (
    "model.base",
    "model.quantization",
    "model.lora.rank",
    "model.lora.alpha",
    "data.dataset",
    "method.name",
    "seed",
)


def log_adapter(client: Any, run: RunDirectory, experiment_id: str, mlflow_run_id: str) -> None:
    """Enter the run's adapter among the experiment's models, once. Its files are the run's artifact ``adapter/``."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    stored = client.get_run(mlflow_run_id)
    if stored.outputs is not None and stored.outputs.model_outputs:
        return
    flat = flatten(run.spec)
    model = client.create_logged_model(
        experiment_id,
        name=_name(run),
        source_run_id=mlflow_run_id,
        tags={"files": f"runs:/{mlflow_run_id}/adapter", "method": method_of(run), "fleetune_run_id": run.run_id},
        params={field: shown(flat[field]) for field in TOLD if field in flat},
        model_type="peft-adapter",
    )
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(mlflow_run_id, [LoggedModelOutput(model.model_id, step=int(flat["rounds.num_rounds"]))])


def _name(run: RunDirectory) -> str:
    """MLflow allows no slashes, colons, dots, percent signs and quotes in a model's name (mlflow 3.17)."""
    return "".join("-" if c in "/:.%\"'" else c for c in run_name(run))
