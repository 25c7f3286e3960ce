"""From a sweep file to its table: checks, Ray Tune for what is missing, figures, MLflow, and going on after a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleetune.engine.launch import run as launch
from fleetune.engine.launch.backends import base_key, ray_backend
from fleetune.engine.launch.cluster import num_cores
from fleetune.engine.launch.directories import git_commit, locked, writable
from fleetune.engine.launch.resolve import num_gpus
from fleetune.errors import Stopped, UserError
from fleetune.problem import Inputs, build_problem, load_inputs
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.driver import Driver, Report, take_stock
from fleetune.sweep.expansion import Trial, checked, in_trial, label, sweep_id, trials_of
from fleetune.sweep.status import OVER, SweepStatus
from fleetune.sweep.trial_runner import inputs_key
from fleetune.tracking.access import check_access

Warn = Callable[[str], None]
MAX_SHARED = 32  # assumed: further seeds and data sets are read by the trials themselves


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    sweep_dir: Path
    status: str
    trials: dict[str, int]
    """Trials by state."""
    best: dict[str, Any] | None
    failures: list[dict[str, Any]]
    synced: bool | None = None
    """Whether MLflow holds all of it; None where that was not asked."""

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it; ``synced`` only where it is false."""
        return {**launch.without_synced(vars(self)), "sweep_dir": str(self.sweep_dir)}

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [f"trials     {', '.join(f'{number} {state}' for state, number in self.trials.items())}"]
        lines += [f"failed     trial {f['trial']} {f['sets']}: {f['error']}" for f in self.failures]
        if self.best:
            metric, value = list(self.best.items())[-1]
            shown = f"{value:.1%}" if metric == "eval_accuracy" else f"{value:.6g}"
            lines += [f"best       {metric} {shown}: trial {self.best['trial']} {label(self.best['overrides'])}"]
        lines += [f"sweep      {self.sweep_dir}", f"next       fleetune ui · fleetune report {self.sweep_dir}"]
        return lines


def run(
    sweep: SweepSpec,
    *,
    workspace: Path,
    address: str | None = None,
    text: str | None = None,
    report: Report | None = None,
    warn: Warn,
) -> SweepResult:
    """Run what is missing of a sweep. UserError before any trial starts; a trial that fails is a row of the table.

    ``text``: the sweep file's, which MLflow shows with the sweep and its trials.
    """
    path = workspace.absolute() / "sweeps" / sweep_id(sweep)
    trials, probes, search = _plan(sweep, path)
    example = (trials or probes)[0].spec
    if example.tracking.enabled:
        check_access(example.tracking.uri)
    sweep_status = SweepStatus(sweep, num_trials=sweep.search.num_trials if search and sweep.search else len(trials))
    stock = take_stock(sweep_status, trials, path)
    if stock.of_other_code:
        told = "trial(s) were finished by another version of the code; their results are taken as they are"
        warn(f"{stock.of_other_code} {told}")
    if stock.outdated:
        warn(
            f"{stock.outdated} trial(s) read data or a model that has changed since; they run again, in runs of their own"
        )
    missing = [entry.trial for entry in sweep_status.entries.values() if entry.status not in OVER]
    is_complete = not missing and len(trials) == sweep_status.num_trials
    shared = {} if is_complete else _prepare([*missing, *probes], workspace, address)
    directory = _open(sweep, path, text)

    def watch(run_path: Path) -> None:
        if example.tracking.enabled:
            launch.record_stream(warn).watch(run_path)

    with locked(directory, field="SWEEP", patience_seconds=5.0):
        driver = Driver(
            sweep, directory, sweep_status, search=search, report=report or (lambda sweep_status: None), watch=watch
        )
        (directory.path / "result.json").unlink(missing_ok=True)
        driver.save()
        watch(directory.path)
        for entry in sweep_status.entries.values():  # those of an earlier launch that MLflow may not have got whole
            if entry.has_begun and entry.run.path.name.startswith(directory.path.name):
                watch(entry.run.path)
        if not is_complete:
            from fleetune.sweep import tune as tuning

            try:
                tuning.run(sweep, driver, shared=shared, num_trials=driver.num_left, known=_known(sweep, sweep_status))
            except KeyboardInterrupt:
                raise Stopped("the same command again") from None
        driver.save()
        result = _summarise(sweep, directory, sweep_status)
    return replace(result, synced=_in_mlflow(directory, sweep_status, warn)) if example.tracking.enabled else result


def _plan(sweep: SweepSpec, path: Path) -> tuple[list[Trial], list[Trial], Any]:
    """(trials that are known, trials that stand for those to come, the search that proposes them)."""
    if sweep.search is None or sweep.search.kind != "optuna":
        return trials_of(sweep), [], None
    from fleetune.sweep.optuna_search import OptunaSearch, probes

    search = OptunaSearch(sweep)
    known = SweepDirectory(path).meta.get("proposed", []) if (path / SweepDirectory.SPEC).is_file() else []
    trials = [Trial(n, overrides, checked(sweep, overrides, number=n)) for n, overrides in enumerate(known)]
    return trials, probes(sweep), search


def _prepare(trials: Sequence[Trial], workspace: Path, address: str | None) -> dict[str, Any]:
    """Join the cluster; meanwhile read model and data, and check every trial with them. Inputs in the object store, by key."""
    backend = ray_backend(address)
    inputs: dict[str, Inputs] = {}
    bases: dict[str, Any] = {}
    for trial in trials:
        key, base = inputs_key(trial.spec), base_key(trial.spec)
        try:
            loaded = inputs.get(key) or load_inputs(trial.spec, base=bases.get(base))
            build_problem(trial.spec, loaded)
        except UserError as error:
            raise in_trial(error, trial.number, trial.overrides) from None
        bases[base] = loaded.base
        if len(inputs) < MAX_SHARED:
            inputs[key] = loaded
    from fleetune.sweep import tune as tuning

    specs = [trial.spec for trial in trials]
    if address is None:
        tuning.check_fits(specs, [num_cores()], [num_gpus()])
    backend.cluster.wait()
    if address is not None:
        tuning.check_fits(specs, tuning.node_cores(), tuning.node_gpus())
    with writable(workspace):
        workspace.mkdir(parents=True, exist_ok=True)
        tuning.check_shared(workspace.absolute())
    return tuning.put(inputs)


def _open(sweep: SweepSpec, path: Path, text: str | None) -> SweepDirectory:
    if (path / SweepDirectory.SPEC).is_file():
        return SweepDirectory.open(path)
    meta = {"sweep": sweep.name, "git_commit": git_commit(), "text": text}
    values = sweep.model_dump(mode="json", exclude_none=True)
    with writable(path.parent.parent):
        return SweepDirectory.create(path.parent.parent, path.name, values, meta=meta, directory=path.parent)


def _known(sweep: SweepSpec, sweep_status: SweepStatus) -> list[tuple[str, list[dict[str, Any]]]]:
    """What trials of earlier launches reached, by which early stopping goes too."""
    if sweep.early_stopping is None:
        return []
    over = [entry.run for entry in sweep_status.entries.values() if entry.status in OVER]
    return [(run.path.name, [row for row, _ in run.round_rows()]) for run in over]


def _summarise(sweep: SweepSpec, directory: SweepDirectory, sweep_status: SweepStatus) -> SweepResult:
    """The report, and ``result.json``, whose presence means that the sweep is over."""
    from fleetune.reports.sweep_report import sweep_report

    entries = [entry for _, entry in sorted(sweep_status.entries.items())]
    has_finished = any(entry.status == "finished" for entry in entries)
    if has_finished:
        sweep_report(directory.path)
    directory.write_csv()
    best = sweep_status.best()
    told = None
    if best is not None:
        told = {
            "trial": best.trial.number,
            "run_id": best.run.path.name,
            "overrides": best.trial.overrides,
            sweep.metric: sweep_status.value(best),
        }
    failures = [
        {"trial": entry.trial.number, "sets": label(entry.trial.overrides), "error": entry.error}
        for entry in entries
        if entry.status == "failed"
    ]
    counts = sweep_status.counts()
    metrics: dict[str, Any] = {f"trials/{state}": number for state, number in counts.items()}
    if told is not None:
        metrics[f"best/{sweep.metric}"] = told[sweep.metric]
    status = "finished" if has_finished or not failures else "failed"
    directory.write_result({"status": status, "metrics": metrics, "trials": counts, "best": told, "failures": failures})
    return SweepResult(directory.path, status, counts, told, failures)


def _in_mlflow(directory: SweepDirectory, sweep_status: SweepStatus, warn: Warn) -> bool:
    """Whether MLflow has all trials that this sweep ran, and then the sweep itself with those that it reused."""
    own = f"{directory.path.name}-"
    paths = [e.run.path for e in sweep_status.entries.values() if e.has_begun and e.run.path.name.startswith(own)]
    return launch.in_mlflow([*paths, directory.path], warn)
