"""Launches a sweep: checks it, runs the missing trials on Ray Tune, writes the report, and sends all to MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleetune.claims import config as claim_config
from fleetune.claims.verdicts import as_dicts, verdicts_of
from fleetune.engine.launch import run as launch
from fleetune.engine.launch.backends import base_key, ray_backend
from fleetune.engine.launch.cluster import num_cores
from fleetune.engine.launch.directories import git_commit, locked, writable
from fleetune.engine.launch.resolve import num_gpus
from fleetune.errors import Stopped, UserError
from fleetune.problem import Inputs, build_problem, load_inputs
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.driver import Driver, Report
from fleetune.sweep.existing_runs import add_trials
from fleetune.sweep.expansion import Trial, checked, in_trial, label, sweep_id, trials_of
from fleetune.sweep.status import OVER, SweepStatus
from fleetune.sweep.trial_runner import inputs_key
from fleetune.tracking.access import check_access

Warn = Callable[[str], None]
MAX_SHARED = 32  # assumed: further seeds and data sets are read by the trials themselves


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep."""

    sweep_dir: Path
    status: str
    trials: dict[str, int]
    """Number of trials by state."""
    best: dict[str, Any] | None
    failures: list[dict[str, Any]]
    claims: list[dict[str, Any]]
    """The verdicts on the sweep's claims, as ``claims.json`` holds them."""
    synced: bool | None = None
    """True if MLflow holds all of it; None if tracking is off."""

    def to_dict(self) -> dict[str, Any]:
        """The document of ``--json``; with ``claims`` only if there are some, with ``synced`` only if it is false."""
        document = {**launch.without_synced(vars(self)), "sweep_dir": str(self.sweep_dir)}
        return document if self.claims else {name: value for name, value in document.items() if name != "claims"}

    def lines(self) -> list[str]:
        """The lines that the terminal shows."""
        lines = [f"trials     {', '.join(f'{number} {state}' for state, number in self.trials.items())}"]
        lines += [f"failed     trial {f['trial']} {f['sets']}: {f['error']}" for f in self.failures]
        if self.best:
            metric, value = list(self.best.items())[-1]
            shown = f"{value:.1%}" if metric == "eval_accuracy" else f"{value:.6g}"
            lines += [f"best       {metric} {shown}: trial {self.best['trial']} {label(self.best['overrides'])}"]
        lines += [f"{'' if i else 'claims':<10} {claim['line']}" for i, claim in enumerate(self.claims)]
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
    """Run the missing trials of a sweep. Raises UserError before any trial starts; a trial that fails is a row of the table.

    ``text``: the sweep file's text, which MLflow shows with the sweep and its trials.
    """
    path = workspace.absolute() / "sweeps" / sweep_id(sweep)
    if (path / SweepDirectory.SPEC).is_file():
        SweepDirectory.open(path)  # refuses one of another version before anything is done
    trials, probes, search = _plan(sweep, path)
    example = (trials or probes)[0].spec
    if example.tracking.enabled:
        check_access(example.tracking.uri)
    sweep_status = SweepStatus(sweep, num_trials=sweep.search.num_trials if search and sweep.search else len(trials))
    existing = add_trials(sweep_status, trials, path)
    if existing.num_of_other_code:
        rest = "trial(s) were finished by another version of the code; their results are taken as they are"
        warn(f"{existing.num_of_other_code} {rest}")
    if existing.num_outdated:
        rest = "trial(s) read data, a model or a method's code that has changed since; they run again, in runs of their own"
        warn(f"{existing.num_outdated} {rest}")
    warn(f"{sweep.name}: {sweep_status.cost_line()}")
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
        _take_claims(sweep, directory, text)
        driver.save()
        watch(directory.path)
        for entry in sweep_status.entries.values():  # earlier launches may have been killed before MLflow got all
            if entry.has_begun and entry.run.path.name.startswith(directory.path.name):
                watch(entry.run.path)
        if not is_complete:
            from fleetune.sweep import tune as tuning

            try:
                earlier = _earlier(sweep, sweep_status)
                tuning.run(sweep, driver, shared=shared, num_trials=driver.num_left, earlier=earlier)
            except KeyboardInterrupt:
                raise Stopped("the same command again") from None
        driver.save()
        result = _summarise(sweep, directory, sweep_status)
    return replace(result, synced=_in_mlflow(directory, sweep_status, warn)) if example.tracking.enabled else result


def _plan(sweep: SweepSpec, path: Path) -> tuple[list[Trial], list[Trial], Any]:
    """(trials so far, trials to check in place of those to come, the search that proposes these or None)."""
    if sweep.search is None or sweep.search.kind != "optuna":
        return trials_of(sweep), [], None
    from fleetune.sweep.optuna_search import OptunaSearch, probes

    search = OptunaSearch(sweep)
    proposed = SweepDirectory(path).meta.get("proposed", []) if (path / SweepDirectory.SPEC).is_file() else []
    trials = [Trial(n, overrides, checked(sweep, overrides, number=n)) for n, overrides in enumerate(proposed)]
    return trials, probes(sweep), search


def _prepare(trials: Sequence[Trial], workspace: Path, address: str | None) -> dict[str, Any]:
    """Join the cluster; meanwhile read models and data, and check every trial with them.

    Returns the inputs in the object store, by key.
    """
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
    from fleetune.sweep import resources
    from fleetune.sweep import tune as tuning

    specs = [trial.spec for trial in trials]
    if address is None:
        resources.check_fits(specs, [num_cores()], [num_gpus()])
    backend.cluster.wait()
    if address is not None:
        resources.check_fits(specs, resources.node_cores(), resources.node_gpus())
    with writable(workspace):
        workspace.mkdir(parents=True, exist_ok=True)
        resources.check_shared(workspace.absolute())
    return tuning.put(inputs)


def _open(sweep: SweepSpec, path: Path, text: str | None) -> SweepDirectory:
    if (path / SweepDirectory.SPEC).is_file():
        return SweepDirectory.open(path)
    meta = {"sweep": sweep.name, "git_commit": git_commit(), "text": text}
    values = sweep.model_dump(mode="json", exclude_none=True)
    with writable(path.parent.parent):
        return SweepDirectory.create(path.parent.parent, path.name, values, meta=meta, directory=path.parent)


def _take_claims(sweep: SweepSpec, directory: SweepDirectory, text: str | None) -> None:
    """Note the claims of this launch, if they are others than before: with other claims it is the same sweep."""
    claims = claim_config.plain(sweep.claims)
    if directory.spec.get("claims", []) != claims:
        directory.replace_claims(claims)
        directory.update_meta(text=text)


def _earlier(sweep: SweepSpec, sweep_status: SweepStatus) -> list[tuple[str, list[dict[str, Any]]]]:
    """(id, rows of rounds) of the trials that are over, which early stopping compares with; none without it."""
    if sweep.early_stopping is None:
        return []
    over = [entry.run for entry in sweep_status.entries.values() if entry.status in OVER]
    return [(run.path.name, [row for row, _ in run.round_rows()]) for run in over]


def _summarise(sweep: SweepSpec, directory: SweepDirectory, sweep_status: SweepStatus) -> SweepResult:
    """Write the report, and then ``result.json``, whose presence means that the sweep is over."""
    from fleetune.reports.sweep_report import sweep_report

    entries = [entry for _, entry in sorted(sweep_status.entries.items())]
    has_finished = any(entry.status == "finished" for entry in entries)
    verdicts = as_dicts(verdicts_of(directory))
    directory.write_verdicts(verdicts)
    if has_finished:
        sweep_report(directory.path)
    directory.write_csv()
    best = sweep_status.best()
    best_row = None
    if best is not None:
        best_row = {
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
    if best_row is not None:
        metrics[f"best/{sweep.metric}"] = best_row[sweep.metric]
    status = "finished" if has_finished or not failures else "failed"
    directory.write_result(
        {"status": status, "metrics": metrics, "trials": counts, "best": best_row, "failures": failures}
    )
    return SweepResult(directory.path, status, counts, best_row, failures, verdicts)


def _in_mlflow(directory: SweepDirectory, sweep_status: SweepStatus, warn: Warn) -> bool:
    """True if MLflow has all trials that this sweep ran, and then the sweep itself with those that it reused."""
    own = f"{directory.path.name}-"
    paths = [e.run.path for e in sweep_status.entries.values() if e.has_begun and e.run.path.name.startswith(own)]
    return launch.in_mlflow([*paths, directory.path], warn)
