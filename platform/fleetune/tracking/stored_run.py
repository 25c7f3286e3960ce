"""A run's entry in a store: the experiment and the run, made once, with parameters, tags and data set."""

from __future__ import annotations

import contextlib
import getpass
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleetune.locks import locked
from fleetune.records.naming import filled_fields, method_of, run_name, shown
from fleetune.records.run_directory import RunDirectory, parent_of
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.tracking.access import check_no_secret, without_password
from fleetune.tracking.client import made_once, make_client
from fleetune.tracking.description import note
from fleetune.tracking.store import default_uri

# mlflow.utils.validation, mlflow 3.17: at most so many params per call.
PARAMS_PER_CALL = 100
# The UI's layout for training runs, not for chat traces, and what its charts show first (mlflow 3.17).
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "eval/accuracy",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}
# A parameter longer than this is of no use in a table; MLflow's own limit is 6,000 (mlflow 3.17).
PARAM_LENGTH = 500
# On the copy of a run that a sweep took as it was found: the id of the run.
REUSED_FROM = "reused_from"


class StoredRun:
    """One run in one store. After an error, make a new one."""

    def __init__(self, run: RunDirectory, *, uri: str | None = None, live: bool = False):
        """``live``: the run is going on now, so one that the store believes to be over has been resumed."""
        self.run, self._live = run, live
        # A sweep's are those of its base.
        tracking = run.spec.get("tracking") or run.spec.get("base", {}).get("tracking") or {}
        self.uri = uri or tracking.get("uri") or default_uri(run.workspace)
        check_no_secret(self.uri)
        self._tracking = tracking
        self._sent: dict[str, set[int]] | None = None
        """Metric -> steps that the store holds; None before it was asked."""
        self._ids: tuple[str, str] = ("", "")
        """Experiment and run in the store."""
        self._notes, self._note = run, "checkpoint/mlflow.json"
        """The directory and the file in it that say what the store was sent."""

    def _connect(self) -> int:
        """Finds or makes the experiment and the run, sends parameters, tags and data set, and asks which steps are there.

        Returns the number of parameters that were sent.
        """
        self._client = make_client(self.uri)
        experiment_id = self._experiment_id()
        stored = self._find_run(experiment_id) or made_once(
            lambda: self._create_run(experiment_id), lambda: self._search_run(experiment_id)
        )
        self._ids = (stored.info.experiment_id, stored.info.run_id)
        self._write_state(uri=without_password(self.uri), experiment_id=self._ids[0], run_id=self._ids[1])
        num_params = self._push_params(stored.data.params)
        self._push_dataset()
        if self._live and stored.info.status != "RUNNING" and self.run.result() is None:  # resumed
            self._client.update_run(stored.info.run_id, status="RUNNING")
            self._set_tags({"status": "running"})
        history = self._client.get_metric_history
        self._sent = {key: {m.step for m in history(self._ids[1], key)} for key in stored.data.metrics}
        return num_params

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._tracking.get("experiment") or self.run.meta.get("sweep") or self.run.spec.get("name") or "fleetune"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            local = not self.uri.startswith(("http", "databricks"))  # a server keeps artifacts where it was told to
            place = (self.run.workspace / "mlartifacts").as_uri() if local else None
            # An error here means that another process was faster, or that the answer was lost: names are unique.
            with contextlib.suppress(MlflowException):
                return self._client.create_experiment(name, artifact_location=place, tags=EXPERIMENT_TAGS)
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise MlflowException(f"experiment {name!r} can be neither found nor created")
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _find_run(self, experiment_id: str) -> Any:
        """The run by the id we noted, or by its tag; None where the store has none, or only a deleted one."""
        from mlflow.exceptions import MlflowException

        noted = self.noted_id()
        if noted is not None:
            try:
                stored = self._client.get_run(noted)
                if stored.info.lifecycle_stage == "active":
                    return stored
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        return self._search_run(experiment_id)

    def _search_run(self, experiment_id: str) -> Any:
        """The run by its tag; None where there is none. Of several, which a lost answer can make, the one that holds most."""
        query = f"tags.fleetune_run_id = '{self.run.run_id}'"
        found = [
            run for run in self._client.search_runs([experiment_id], filter_string=query) if self._is_this_run(run)
        ]
        return max(found, key=lambda run: (len(run.data.metrics), len(run.data.params), run.info.run_id), default=None)

    def _is_this_run(self, stored: Any) -> bool:
        """True if a stored run with this one's id is it, and not a copy under a sweep that reused it."""
        return REUSED_FROM not in stored.data.tags

    def _remove_doubles(self) -> None:
        """Runs that were made twice because an answer came too late to be waited for: those that hold nothing go to the trash."""
        query = f"tags.fleetune_run_id = '{self.run.run_id}'"
        for stored in self._client.search_runs([self._ids[0]], filter_string=query):
            is_empty = not stored.data.metrics and not stored.data.params
            if is_empty and stored.info.run_id != self._ids[1] and self._is_this_run(stored):
                self._client.delete_run(stored.info.run_id)

    def _create_run(self, experiment_id: str) -> Any:
        tags = {**self._tags(), "status": "running"}
        name = run_name(self.run)
        return self._client.create_run(experiment_id, start_time=self._started_at_ms(), tags=tags, run_name=name)

    def _started_at_ms(self) -> int:
        return int(self.run.meta.get("started_at", time.time()) * 1000)

    def _tags(self) -> dict[str, str]:
        meta = self.run.meta
        tags = {
            "fleetune_run_id": self.run.run_id,
            "method": method_of(self.run) if "method" in self.run.spec else None,
            "spec_hash": meta.get("spec_hash"),
            "identity": meta.get("identity"),
            "git_commit": meta.get("git_commit"),
            "sweep": meta.get("sweep"),
            "trained_model": meta.get("model", {}).get("trained"),
            "costed_model": meta.get("model", {}).get("costed"),
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "fleetune",
            "mlflow.source.git.commit": meta.get("git_commit"),
            "mlflow.note.content": note(self.run),
        }
        return {k: str(v) for k, v in {**tags, **self._parent_tags()}.items() if v is not None}

    def _parent_tags(self) -> dict[str, str]:
        parent = parent_of(self.run)
        if (
            parent is None
            or not (parent / SweepDirectory.SPEC).is_file()
            or not parent.is_relative_to(self.run.workspace)
        ):
            return {}
        return {"mlflow.parentRunId": StoredRun(SweepDirectory.open(parent), uri=self.uri).run_id()}

    def run_id(self) -> str:
        """The run's id in the store; made now where there is none yet."""
        with locked(self._notes.path / "checkpoint" / "mlflow.lock"):
            if self._sent is None:
                self._connect()
        return self._ids[1]

    def noted_id(self) -> str | None:
        """The run's id in this store as it was noted; None where nothing of it was sent there."""
        state = self._state()
        return state.get("run_id") if state.get("uri") == without_password(self.uri) else None

    def _push_params(self, present: Mapping[str, str]) -> int:
        from mlflow.entities import Param

        flat = {
            k: shown(v)
            for k, v in filled_fields(self.run.spec).items()
            # Claims may change after the start, and parameters cannot: their verdicts are tags.
            if k != "claims" and not k.startswith(("tracking.", "base.tracking."))
        }
        params = [Param(k, v if len(v) <= PARAM_LENGTH else v[: PARAM_LENGTH - 1] + "…") for k, v in flat.items()]
        params = [p for p in params if p.key not in present]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(self._ids[1], params=params[start : start + PARAMS_PER_CALL])
        return len(params)

    def _push_dataset(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = self.run.meta.get("dataset")
        if not dataset:
            return
        name, source = str(dataset["name"]), str(dataset.get("source") or dataset["name"])
        digest = str(dataset.get("digest") or "unknown")[:36]  # MLflow's limit; runs of old did not note one
        profile = {k: v for k, v in dataset.items() if k not in ("name", "digest", "source")}
        kind = "hf" if "/" in source and not Path(source).exists() else "local"
        where = json.dumps({"path": source} if kind == "hf" else {"uri": source})
        entity = Dataset(name, digest, source_type=kind, source=where, profile=json.dumps(profile))
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self._ids[1], [DatasetInput(entity, tags)])

    # ------------------------------------------------------------------ what is noted of it beside the run

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._ids[1], tags=[RunTag(k, v) for k, v in tags.items()])

    def _state(self) -> dict[str, Any]:
        """The notes on this run in a store; empty if there are none."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads((self._notes.path / self._note).read_text())
        return {}

    def _write_state(self, **fields: Any) -> None:
        self._notes.write(self._note, json.dumps({**self._state(), **fields}, indent=2).encode())
