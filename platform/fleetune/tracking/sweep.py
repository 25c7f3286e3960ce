"""A sweep in MLflow: a parent run, under which every trial stands once, and the best of them tagged.

MLflow allows a run one parent. A trial that a sweep took as it was found, from another sweep or a run by itself, stands under
its own parent or none; so the sweep gets a copy of it: parameters, metrics of every round and tags, without the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.claims.verdicts import summary
from fleetune.columns import HIGHER_IS_BETTER
from fleetune.errors import shortened
from fleetune.locks import locked
from fleetune.records.run_directory import RunDirectory, parent_of
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.tracking.stored_run import REUSED_FROM
from fleetune.tracking.tracker import SyncReport, Tracker

BEST = "best"
CLAIMS, CLAIM = "claims", "claim"
TAG_LENGTH = (
    1000  # characters of a verdict's line; assumed: no claim needs more, and MLflow's own limit is 8,000 (mlflow 3.17)
)
OVER = ("finished", "stopped")


class ReusedRun(RunDirectory):
    """A run as a sweep sees it that did not run it: with what the sweep's trial changes."""

    def __init__(self, path: Path, sweep: SweepDirectory, overrides: dict[str, Any]):
        super().__init__(path)
        self._of_sweep = {"overrides": overrides, **{name: sweep.meta.get(name) for name in ("sweep", "text")}}

    @property
    def meta(self) -> dict[str, Any]:
        """The run's own, with the sweep's values on top."""
        return {**super().meta, **self._of_sweep}


class ReusedTracker(Tracker):
    """The copy of a run under a sweep. What was sent of it is noted with the sweep, which is whose it is."""

    def __init__(self, run: ReusedRun, sweep: SweepDirectory, parent: tuple[str, str], *, uri: str):
        """``parent``: experiment and run of the sweep in MLflow."""
        super().__init__(run, uri=uri)
        self._parent = parent
        self._notes, self._note = sweep, f"checkpoint/reused/{run.path.name}.json"

    def _experiment_id(self) -> str:
        return self._parent[0]

    def _parent_tags(self) -> dict[str, str]:
        return {"mlflow.parentRunId": self._parent[1], REUSED_FROM: self.run.run_id}

    def _is_this_run(self, stored: Any) -> bool:
        return REUSED_FROM in stored.data.tags and stored.data.tags.get("mlflow.parentRunId") == self._parent[1]

    def _push_files(self, result: dict[str, Any] | None) -> int:
        return 0


class SweepTracker(Tracker):
    """A sweep's run, the copies of trials that it reused, and the tag of the best."""

    run: SweepDirectory

    def __init__(self, run: SweepDirectory, *, uri: str | None = None, live: bool = False):
        super().__init__(run, uri=uri, live=live)
        self._copies: dict[str, str] = {}
        """Trials that were reused, as far as they are in the store: run id -> MLflow's."""
        self._reused: dict[str, bool] = {}
        self._claim_tags: dict[str, str] | None = None
        """The tags of claims that this tracker knows to be in the store; None before it has looked."""

    def push(self, *, interrupted: bool = False) -> SyncReport:
        """One pass over the sweep's own run, and over what it alone knows of its trials."""
        sent = super().push(interrupted=interrupted)
        rows = [row for row in self.run.rows() if self._is_in_workspace(row["run_dir"])]
        for row in rows:
            if row["run_id"] not in self._copies and self._is_reused(row):
                run = ReusedRun(Path(row["run_dir"]), self.run, row["overrides"])
                copied = ReusedTracker(run, self.run, self._ids, uri=self.uri).push()
                self._copies[row["run_id"]] = copied.mlflow_run_id
                sent = sent.with_parts_of(copied)
        self._tag_best(rows)
        self._tag_claims()
        if self.run.result() is not None:
            self._release_replaced({row["run_id"] for row in rows})
        return sent

    def _is_reused(self, row: dict[str, Any]) -> bool:
        """True if this trial is a run that the sweep found, of another sweep or by itself, and did not run."""
        if row["run_id"] not in self._reused:
            self._reused[row["run_id"]] = parent_of(RunDirectory(Path(row["run_dir"]))) != self.run.path
        return self._reused[row["run_id"]]

    def _is_in_workspace(self, run_dir: str | None) -> bool:
        """True if a trial has a run within the workspace: the table of a stranger's sweep leads nowhere else."""
        inside = run_dir is not None and Path(run_dir).is_relative_to(self.run.workspace)
        return inside and (Path(str(run_dir)) / RunDirectory.SPEC).is_file()

    def _tag_best(self, rows: list[dict[str, Any]]) -> None:
        """Tag the best trial that is over, as the sweep's own table has it; the one that was best before loses the tag."""
        metric = str(self.run.spec.get("metric", "eval_accuracy"))
        sign = 1 if metric in HIGHER_IS_BETTER else -1
        scored = [row for row in rows if row["status"] in OVER and _is_number(row.get(metric))]
        if not scored:
            return
        best = max(scored, key=lambda row: sign * row[metric])
        mlflow_id = self._copies.get(best["run_id"]) or self._child_id(Path(best["run_dir"]))
        with locked(self.run.path / "checkpoint" / "mlflow.lock"):
            state = self._state()
            before = state.get(BEST, []) if state.get("best_of") == self._ids[1] else []
            if before == [mlflow_id]:
                return
            # A kill may come between the next calls: note first all that may have the tag.
            self._write_state(best=[*before, mlflow_id], best_of=self._ids[1])
            for other in before:
                if other != mlflow_id:
                    self._delete_tag(other, BEST)
            self._client.set_tag(mlflow_id, BEST, "true")
            self._write_state(best=[mlflow_id])

    def _tag_claims(self) -> None:
        """Tag the sweep's run with the verdicts of ``claims.json``; tags of claims that are gone go, too."""
        tags = claim_tags(self.run.verdicts())
        if tags == self._claim_tags:
            return
        stored = self._client.get_run(self._ids[1]).data.tags
        for name in stored:
            if (name == CLAIMS or name.startswith(f"{CLAIM}/")) and name not in tags:
                self._delete_tag(self._ids[1], name)
        changed = {name: value for name, value in tags.items() if stored.get(name) != value}
        if changed:
            self._set_tags(changed)
        self._claim_tags = tags

    def _child_id(self, run_dir: Path) -> str:
        """A trial's run in the store, as noted with it; made now where there is none yet."""
        child = Tracker(RunDirectory(run_dir), uri=self.uri)
        return child.noted_id() or child.run_id()

    def _release_replaced(self, run_ids: set[str]) -> None:
        """Trials of this sweep that broke off and were then found finished elsewhere stand under it no longer: the copies do."""
        for stored in self._children():
            run_id = stored.data.tags.get("fleetune_run_id", "")
            if (
                run_id.startswith(f"{self.run.path.name}-")
                and run_id not in run_ids
                and REUSED_FROM not in stored.data.tags
            ):
                self._delete_tag(stored.info.run_id, "mlflow.parentRunId")

    def _children(self) -> list[Any]:
        query, token, found = f"tags.`mlflow.parentRunId` = '{self._ids[1]}'", None, []
        while True:
            page = self._client.search_runs([self._ids[0]], filter_string=query, page_token=token)
            found += list(page)
            token = page.token
            if not token:
                return found

    def _delete_tag(self, mlflow_id: str, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            if name in self._client.get_run(mlflow_id).data.tags:
                self._client.delete_tag(mlflow_id, name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise


def claim_tags(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tags of a sweep's claims: how many came out how, and a line for each, numbered from 1 in the sweep file's order."""
    if not verdicts:
        return {}
    lines = {f"{CLAIM}/{number:02d}": str(verdict["line"]) for number, verdict in enumerate(verdicts, start=1)}
    counts = summary(str(verdict["verdict"]) for verdict in verdicts)
    return {CLAIMS: counts, **{name: shortened(line, TAG_LENGTH) for name, line in lines.items()}}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
