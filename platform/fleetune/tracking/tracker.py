"""MLflow, fed from run directories. Only the modules tracking* import mlflow.

One code path serves both streaming (:class:`RecordStream` calls it again and again while a run goes on) and
``fleetune sync``: ask the store what it holds of this run, send the rest. So each (metric, step) arrives
once, however often either was interrupted. Rounds that a store already holds are never sent again, values
that are not finite are not sent at all.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from fleetune.errors import UserError
from fleetune.locks import locked
from fleetune.records.naming import flatten, method_of, run_name, shown
from fleetune.records.run_directory import RunDirectory, parent_of
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.tracking.access import check_no_secret, without_password
from fleetune.tracking.artifacts import files_of
from fleetune.tracking.client import QUIET, made_once, make_client
from fleetune.tracking.description import note
from fleetune.tracking.logged_model import log_adapter
from fleetune.tracking.metrics import RoundMetrics, number
from fleetune.tracking.store import ensure_store
from fleetune.tracking.system_metrics import SystemMetrics

__all__ = ["SyncReport", "Tracker", "default_uri", "open_ui"]

# Artifacts of a run, where they exist. The adapter and the figures are folders.
ARTIFACTS = (
    "spec.yaml",
    "sweep.yaml",
    "result.json",
    "trials.parquet",
    "trials.csv",
    "rounds.parquet",
    "clients.parquet",
    "trace.json",
    "report.html",
    "adapter",
    "figures",
)
# mlflow.utils.validation, mlflow 3.17: at most so many params per call, and metrics per call.
PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000
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


@dataclass(frozen=True)
class SyncReport:
    """What one pass sent: where to, and how much of it the store did not hold before."""

    uri: str
    experiment_id: str
    mlflow_run_id: str
    num_metrics: int
    num_params: int
    num_artifacts: int
    left_out: tuple[str, ...] = ()
    """Links among the run's files that lead out of its directory: they are not followed."""

    def with_parts_of(self, other: SyncReport) -> SyncReport:
        """The same destination, and the sums of what was sent."""
        counts = {
            name: getattr(self, name) + getattr(other, name) for name in ("num_metrics", "num_params", "num_artifacts")
        }
        return replace(self, **counts, left_out=(*self.left_out, *other.left_out))


def default_uri(workspace: str | Path) -> str:
    """The store in a workspace: an SQLite file."""
    return f"sqlite:///{Path(workspace).absolute() / 'mlflow.db'}"


def own_trials(sweep: SweepDirectory) -> list[RunDirectory]:
    """The trials that this sweep ran itself; others were taken as they were found."""
    runs = [run for run in sweep.runs() if parent_of(run) == sweep.path]
    return [run for run in runs if run.path.is_relative_to(sweep.workspace)]


class Tracker:
    """One run in one store. :meth:`push` may be called again; after an error, make a new Tracker."""

    def __init__(self, run: RunDirectory, *, uri: str | None = None, live: bool = False):
        """``live``: the run is going on now, so one that the store believes to be over has been resumed."""
        self.run, self._live = run, live
        tracking = (
            run.spec.get("tracking") or run.spec.get("base", {}).get("tracking") or {}
        )  # a sweep's are its base's
        self.uri = uri or tracking.get("uri") or default_uri(run.workspace)
        check_no_secret(self.uri)
        self._experiment = tracking.get("experiment")
        self._system = SystemMetrics() if live and tracking.get("system_metrics") else None
        self._metrics = RoundMetrics()
        self._sent: dict[str, set[int]] | None = None
        self._ids: tuple[str, str] = ("", "")
        self._closed = False
        self._left_out: list[str] = []
        self._notes, self._note = run, "checkpoint/mlflow.json"  # where is noted what the store was sent

    def push(self, *, interrupted: bool = False) -> SyncReport:
        """One pass: rounds not sent yet; once the run is over (``interrupted``: without a result) also artifacts and status."""
        with locked(self._notes.path / "checkpoint" / "mlflow.lock"):
            num_params = self._connect() if self._sent is None else 0
            result = self.run.result()  # before the rounds: where there is a result, there are no rounds to come
            num_metrics = self._push_rounds()
            num_artifacts = 0
            if (result or interrupted) and not self._closed:
                num_artifacts = self._close(result)
        sent = (num_metrics, num_params, num_artifacts)
        return SyncReport(without_password(self.uri), *self._ids, *sent, left_out=tuple(self._left_out))

    # ------------------------------------------------------------------ the run in the store

    def _connect(self) -> int:
        """Finds or makes the experiment and the run, sends params, tags and dataset, and asks which steps are
        there.
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

        name = self._experiment or self.run.meta.get("sweep") or self.run.spec.get("name") or "fleetune"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            local = not self.uri.startswith(("http", "databricks"))  # a server keeps artifacts where it was told to
            place = (self.run.workspace / "mlartifacts").as_uri() if local else None
            with contextlib.suppress(
                MlflowException
            ):  # another process was faster, or the answer was lost: names are unique
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
        found = [run for run in self._client.search_runs([experiment_id], filter_string=query) if self._is_mine(run)]
        return max(found, key=lambda run: (len(run.data.metrics), len(run.data.params), run.info.run_id), default=None)

    def _is_mine(self, stored: Any) -> bool:
        """Whether a run with this one's id is it, and not a copy under a sweep that reused it."""
        return REUSED_FROM not in stored.data.tags

    def _remove_doubles(self) -> None:
        """Runs that were made twice because an answer came too late to be waited for: those that hold nothing go to the trash."""
        query = f"tags.fleetune_run_id = '{self.run.run_id}'"
        for stored in self._client.search_runs([self._ids[0]], filter_string=query):
            is_empty = not stored.data.metrics and not stored.data.params
            if is_empty and stored.info.run_id != self._ids[1] and self._is_mine(stored):
                self._client.delete_run(stored.info.run_id)

    def _create_run(self, experiment_id: str) -> Any:
        started_at_ms = int(self.run.meta.get("started_at", time.time()) * 1000)
        tags = {**self._tags(), "status": "running"}
        name = run_name(self.run)
        return self._client.create_run(experiment_id, start_time=started_at_ms, tags=tags, run_name=name)

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
        return {"mlflow.parentRunId": Tracker(SweepDirectory.open(parent), uri=self.uri).run_id()}

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
            k: shown(v) for k, v in flatten(self.run.spec).items() if not k.startswith(("tracking.", "base.tracking."))
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

    # ------------------------------------------------------------------ rounds and the end

    def _push_rounds(self) -> int:
        from mlflow.entities import Metric

        assert self._sent is not None
        news: list[Metric] = []
        for row, recorded_at_ms in self.run.round_rows(first_round=self._metrics.next_round):
            step = int(row["round"])
            for key, value in self._metrics.of(row).items():
                if step not in self._sent.get(key, ()):
                    news.append(Metric(key, value, recorded_at_ms, step))
        if news and self._system is not None:
            sampled = self._system.sample(step=news[-1].step)
            news += [metric for metric in sampled if metric.step not in self._sent.get(metric.key, ())]
        for start in range(0, len(news), METRICS_PER_CALL):
            self._client.log_batch(self._ids[1], metrics=news[start : start + METRICS_PER_CALL])
        return len(news)

    def _close(self, result: dict[str, Any] | None) -> int:
        """Artifacts, the summary and the final status; a sweep, which has no rounds, gets its result as
        metrics.
        """
        if result and not self._metrics.next_round:
            self._push_result(result)
        num_artifacts = self._push_files(result)
        self._remove_doubles()
        status = str(result.get("status", "finished")) if result else "interrupted"
        self._set_tags({"status": status, "mlflow.note.content": note(self.run)})
        over = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        stored = self._client.get_run(self._ids[1])
        if stored.info.status != over:
            ended_at = (self.run.path / "result.json").stat().st_mtime if result else time.time()
            self._client.set_terminated(self._ids[1], status=over, end_time=int(ended_at * 1000))
        self._closed = result is not None
        return num_artifacts

    def _push_result(self, result: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        assert self._sent is not None
        values = {key: number(value) for key, value in flatten(result.get("metrics") or {}).items()}
        now_ms = int(time.time() * 1000)
        news = [Metric(k, v, now_ms, 0) for k, v in values.items() if v is not None and 0 not in self._sent.get(k, ())]
        self._client.log_batch(self._ids[1], metrics=news)

    def _push_files(self, result: dict[str, Any] | None) -> int:
        """Artifacts, among them the adapter, which is entered among the experiment's models."""
        num_artifacts = self._push_artifacts()
        if result and (self.run.path / "adapter").is_dir():
            log_adapter(self._client, self.run, *self._ids)
        return num_artifacts

    def _push_artifacts(self) -> int:
        """Uploads files whose content the store does not have; what was sent is noted in
        ``checkpoint/mlflow.json``.
        """
        if not (self.run.path / "figures").is_dir() and self._metrics.next_round:
            from fleetune.reports.figures.runs import write_figures

            write_figures(self.run)
        state = self._state()
        sent = state.get("artifacts", {}) if state.get("artifacts_of") == self._ids[1] else {}
        num_sent = 0
        files, self._left_out = files_of(self.run.path, ARTIFACTS)
        for path in files:
            name = path.relative_to(self.run.path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if sent.get(str(name)) != digest:
                folder = str(name.parent) if name.parent != Path() else None
                self._client.log_artifact(self._ids[1], str(path), folder)
                sent[str(name)] = digest
                num_sent += 1
        self._write_state(artifacts_of=self._ids[1], artifacts=sent)
        return num_sent

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._ids[1], tags=[RunTag(k, v) for k, v in tags.items()])

    def _state(self) -> dict[str, Any]:
        """What was noted of this run in a store."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads((self._notes.path / self._note).read_text())
        return {}

    def _write_state(self, **fields: Any) -> None:
        self._notes.write(self._note, json.dumps({**self._state(), **fields}, indent=2).encode())


def open_ui(workspace: str | Path, port: int = 5000, *, uri: str | None = None) -> NoReturn:
    """Becomes the MLflow UI on a workspace's store, until it is stopped."""
    workspace = Path(workspace).absolute()
    store = uri or default_uri(workspace)
    if uri is None and not (workspace / "mlflow.db").exists():
        hint = "run a job here first, or send a run's records: fleetune sync RUN_DIR"
        raise UserError("this workspace has no MLflow store yet", field="workspace", value=str(workspace), hint=hint)
    ensure_store(store)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1"]
    command += [
        "--port",
        str(port),
        "--workers",
        "1",
        "--artifacts-destination",
        str(workspace / "mlartifacts"),
    ]
    # In place of this process, so that stopping it stops the server.
    os.execve(sys.executable, command, {**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
