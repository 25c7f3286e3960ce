"""Ray Tune, from the driver's side: Tune asks it for trials and reports what becomes of them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from fleetune.engine.execution.ray_worker import SharedInputs
from fleetune.problem import Inputs
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.driver import Driver
from fleetune.sweep.resources import placement_group
from fleetune.sweep.trainable import TrialProcess

MAX_DEATHS = 3  # assumed: a trial whose process dies so often is to blame itself (memory, a crash in native code)
# The run directory is the checkpoint and MLflow is fed from it: Tune writes nothing of its own, and prints nothing.
QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "86400",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


def run(
    sweep: SweepSpec,
    driver: Driver,
    *,
    shared: Mapping[str, SharedInputs],
    num_trials: int,
    earlier: Sequence[tuple[str, list[dict[str, Any]]]],
) -> None:
    """Run the driver's trials on the cluster that this process has joined.

    ``shared``: inputs in the object store, by key. ``num_trials``: how many will be asked for, at most. ``earlier``: (id, rows of
    rounds) of trials that ran in an earlier launch, which early stopping compares with.
    """
    trainable = tune.with_parameters(TrialProcess, shared=dict(shared))
    trainable = tune.with_resources(trainable, placement_group)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="fleetune-tune-") as folder, _quiet_tune(sweep):
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=_TrialSource(driver),
                scheduler=_scheduler(sweep, earlier),
                num_samples=num_trials,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                name="sweep",
                verbose=0,
                callbacks=[_Callback(driver)],
                failure_config=tune.FailureConfig(max_failures=MAX_DEATHS - 1),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()


@contextlib.contextmanager
def _quiet_tune(sweep: SweepSpec) -> Iterator[None]:
    """Switches Tune's own habits off while a sweep runs.

    Tune asks for trials before there is room for them; not so for Optuna, whose next proposal should know the last result.
    """
    is_adaptive = sweep.search is not None and sweep.search.kind == "optuna"
    values = {**QUIET_TUNE, "TUNE_MAX_PENDING_TRIALS_PG": "1" if is_adaptive else "16"}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def put(inputs: Mapping[str, Inputs]) -> dict[str, SharedInputs]:
    """Put inputs into the object store, each base model once; the same keys name what lies there."""
    bases: dict[str, Any] = {}
    shared: dict[str, SharedInputs] = {}
    for key, loaded in inputs.items():
        base = loaded.base.key
        shared[key] = SharedInputs.put(loaded, base=bases.get(base))
        bases[base] = shared[key].base
    return shared


# -- Tune's hooks ------------------------------------------------------------
# Tune pickles both with every experiment, in case it has to restore one. Here a sweep goes on from its run directories instead,
# and a driver, with its terminal and its processes, cannot be pickled: so both pickle as nothing.
class _TrialSource(Searcher):
    """Gives Tune the driver's next trial."""

    def __init__(self, driver: Driver):
        super().__init__()
        self.driver = driver

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        order = self.driver.next_order()
        if order is not None:
            return {"order": order.to_json()}
        return Searcher.FINISHED if self.driver.is_exhausted() else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Callback(tune.Callback):
    """Tells the driver what becomes of each trial."""

    def __init__(self, driver: Driver):
        self.driver = driver

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.driver.on_start(_number(trial))

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if not result.get("done"):
            self.driver.on_round(_number(trial), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.driver.on_end(_number(trial), trial.last_result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.driver.on_death(_number(trial), _reason(trial))


def _number(trial: Any) -> int:
    return int(json.loads(trial.config["order"])["number"])


def _reason(trial: Any) -> str:
    lines = [line for line in str(trial.get_error() or "").strip().splitlines() if line.strip()]
    return f"its process failed {MAX_DEATHS} times" + (f": {lines[-1].strip()}" if lines else "")


def _scheduler(sweep: SweepSpec, earlier: Sequence[tuple[str, list[dict[str, Any]]]]) -> Any:
    """ASHA over the sweep's metric; None without early stopping."""
    rule = sweep.early_stopping
    if rule is None:
        return None
    scheduler = AsyncHyperBandScheduler(
        time_attr="round",
        metric=sweep.metric,
        mode="max" if sweep.sign > 0 else "min",
        max_t=10**6,
        grace_period=rule.grace_rounds,
        reduction_factor=rule.reduction_factor,
        stop_last_trials=False,
    )
    # Tune has no way to enter results of trials that it did not run, so what they reached goes into each rung by hand.
    for trial_id, rows in earlier:
        for row in rows:
            if row.get(sweep.metric) is not None:
                value = sweep.sign * float(row[sweep.metric])
                trial: Any = SimpleNamespace(trial_id=trial_id)
                scheduler._brackets[0].on_result(trial, int(row["round"]), value)
    return scheduler
