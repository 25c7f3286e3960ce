"""MLflow, fed from run directories: metrics of rounds, artifacts, the end of a run.

One code path serves both streaming (:class:`RecordStream` calls it again and again while a run goes on) and
``fleetune sync``: ask the store what it holds of this run, send the rest. So each (metric, step) arrives
once, however often either was interrupted. Rounds that a store already holds are never sent again, values
that are not finite are not sent at all.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleetune.columns import UNTRAINED
from fleetune.locks import locked
from fleetune.records.naming import filled_fields
from fleetune.records.run_directory import RunDirectory
from fleetune.tracking.access import without_password
from fleetune.tracking.artifacts import files_of
from fleetune.tracking.description import note
from fleetune.tracking.logged_model import log_adapter
from fleetune.tracking.metrics import RoundMetrics, number, of_baseline
from fleetune.tracking.stored_run import StoredRun
from fleetune.tracking.system_metrics import SystemMetrics

# Artifacts of a run, where they exist. The last three are folders.
ARTIFACTS = (
    "spec.yaml",
    "sweep.yaml",
    "result.json",
    "claims.json",
    "trials.parquet",
    "trials.csv",
    "rounds.parquet",
    "clients.parquet",
    "personal.parquet",
    "trace.json",
    "report.html",
    "method",
    "adapter",
    "figures",
)
# mlflow.utils.validation, mlflow 3.17: at most so many metrics per call.
METRICS_PER_CALL = 1000


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


class Tracker(StoredRun):
    """What is sent of one run to one store. :meth:`push` may be called again; after an error, make a new Tracker."""

    def __init__(self, run: RunDirectory, *, uri: str | None = None, live: bool = False):
        """``live``: the run is going on now, so one that the store believes to be over has been resumed."""
        super().__init__(run, uri=uri, live=live)
        self._system = SystemMetrics() if live and self._tracking.get("system_metrics") else None
        self._metrics = RoundMetrics()
        self._has_baseline = False
        self._closed = False
        self._left_out: list[str] = []

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

    def _push_rounds(self) -> int:
        from mlflow.entities import Metric

        assert self._sent is not None
        unsent = [
            Metric(key, value, self._started_at_ms(), UNTRAINED)
            for key, value in self._baseline().items()
            if UNTRAINED not in self._sent.get(key, ())
        ]
        for row, recorded_at_ms in self.run.round_rows(first_round=self._metrics.next_round):
            step = int(row["round"])
            for key, value in self._metrics.of(row).items():
                if step not in self._sent.get(key, ()):
                    unsent.append(Metric(key, value, recorded_at_ms, step))
        if unsent and self._system is not None:
            sampled = self._system.sample(step=unsent[-1].step)
            unsent += [metric for metric in sampled if metric.step not in self._sent.get(metric.key, ())]
        for start in range(0, len(unsent), METRICS_PER_CALL):
            self._client.log_batch(self._ids[1], metrics=unsent[start : start + METRICS_PER_CALL])
        return len(unsent)

    def _baseline(self) -> dict[str, float]:
        """The untrained model's metrics, once: it is evaluated beside the first round, so they may come after that round's."""
        if self._has_baseline:
            return {}
        metrics = of_baseline(self.run.meta.get("baseline") or {})
        self._has_baseline = bool(metrics)
        return metrics

    def _close(self, result: dict[str, Any] | None) -> int:
        """Sends artifacts, the summary and the final status; a sweep, which has no rounds, gets its result as metrics."""
        if result and self._metrics.next_round == 1:
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
        values = {key: number(value) for key, value in filled_fields(result.get("metrics") or {}).items()}
        now_ms = int(time.time() * 1000)
        unsent = [
            Metric(k, v, now_ms, 0) for k, v in values.items() if v is not None and 0 not in self._sent.get(k, ())
        ]
        self._client.log_batch(self._ids[1], metrics=unsent)

    def _push_files(self, result: dict[str, Any] | None) -> int:
        """Artifacts, among them the adapter, which is entered among the experiment's models."""
        num_artifacts = self._push_artifacts()
        if result and (self.run.path / "adapter").is_dir():
            log_adapter(self._client, self.run, *self._ids)
        return num_artifacts

    def _push_artifacts(self) -> int:
        """Uploads files whose content the store does not have, and notes them in ``checkpoint/mlflow.json``. Returns how many."""
        if not (self.run.path / "figures").is_dir() and self._metrics.next_round > 1:
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
