"""A run's adapter as MLflow's logged model, which names its run, base model and data."""

from __future__ import annotations

from typing import Any

from fleetune.records.naming import filled_fields, method_of, run_name, shown
from fleetune.records.run_directory import RunDirectory
from fleetune.tracking.client import made_once

LOGGED_FIELDS = (
    "model.base",
    "model.quantization",
    "model.lora.rank",
    "model.lora.alpha",
    "data.dataset",
    "method.name",
    "seed",
)


def log_adapter(client: Any, run: RunDirectory, experiment_id: str, mlflow_run_id: str) -> None:
    """Enters the run's adapter among the experiment's models, once. Its files are the run's artifact ``adapter/``."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    stored = client.get_run(mlflow_run_id)
    if stored.outputs is not None and stored.outputs.model_outputs:
        return
    flat = filled_fields(run.spec)

    def find() -> Any:
        query = f"tags.fleetune_run_id = '{run.run_id}'"
        found = client.search_logged_models([experiment_id], filter_string=query)
        return next((model for model in found if model.source_run_id == mlflow_run_id), None)

    def make() -> Any:
        return client.create_logged_model(
            experiment_id,
            name=_name(run),
            source_run_id=mlflow_run_id,
            tags={"files": f"runs:/{mlflow_run_id}/adapter", "method": method_of(run), "fleetune_run_id": run.run_id},
            params={field: shown(flat[field]) for field in LOGGED_FIELDS if field in flat},
            model_type="peft-adapter",
        )

    def outputs() -> Any:
        logged = client.get_run(mlflow_run_id).outputs
        return logged.model_outputs or None if logged is not None else None

    model = find() or made_once(make, find)  # found where an earlier pass was cut off between this and what follows
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    output = LoggedModelOutput(model.model_id, step=int(flat["rounds.num_rounds"]))
    made_once(lambda: client.log_outputs(mlflow_run_id, [output]), outputs)


def _name(run: RunDirectory) -> str:
    """MLflow allows no slashes, colons, dots, percent signs and quotes in a model's name (mlflow 3.17)."""
    return "".join("-" if c in "/:.%\"'" else c for c in run_name(run))
