"""Ray Tune, from the driver's side: which trial comes next, on which resources, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fleetune.engine.execution.ray_worker import SharedInputs
from fleetune.engine.launch.resolve import gpu_fraction
from fleetune.errors import UserError
from fleetune.problem import Inputs
from fleetune.run_config import ExecutionConfig
from fleetune.spec import RunSpec
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.trainable import TrialProcess, sees
from fleetune.sweep.trial_runner import TrialOrder

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


class Conductor(Protocol):
    """Who decides what is tried, and takes the results."""

    def next_order(self) -> TrialOrder | None:
        """The next trial; None where there is none, or none for now."""
        ...

    def is_exhausted(self) -> bool:
        """Whether no trial will come any more."""
        ...

    def on_start(self, number: int) -> None:
        """A trial has a process."""
        ...

    def on_round(self, number: int, result: Mapping[str, Any]) -> None:
        """A round of a trial is over."""
        ...

    def on_end(self, number: int, result: Mapping[str, Any]) -> None:
        """A trial is over: finished, failed, or (``over`` null) stopped by the scheduler."""
        ...

    def on_death(self, number: int, reason: str) -> None:
        """A trial's process has died too often."""
        ...


def run(
    sweep: SweepSpec,
    conductor: Conductor,
    *,
    shared: Mapping[str, SharedInputs],
    num_trials: int,
    known: Sequence[tuple[str, list[dict[str, Any]]]],
) -> None:
    """Run the conductor's trials on the cluster that this process has joined.

    ``known``: (id, rows of rounds) of trials that ran in an earlier launch, by which early stopping goes too.
    """
    trainable = tune.with_parameters(TrialProcess, shared=dict(shared))
    trainable = tune.with_resources(trainable, resources_of)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="fleetune-tune-") as folder, _quiet_tune(sweep):
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=_Source(conductor),
                scheduler=_scheduler(sweep, known),
                num_samples=num_trials,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                name="sweep",
                verbose=0,
                callbacks=[_Callback(conductor)],
                failure_config=tune.FailureConfig(max_failures=MAX_DEATHS - 1),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()


@contextlib.contextmanager
def _quiet_tune(sweep: SweepSpec) -> Iterator[None]:
    """Tune's own habits off while a sweep runs; trials of a search that goes by results are not asked for early."""
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


# -- resources ------------------------------------------------------------
def bundles_of(spec: RunSpec) -> list[dict[str, float]]:
    """What a trial takes: its process, or one bundle for each worker of a gang (its coordinator computes next to nothing)."""
    workers = int(spec.execution.workers) if spec.execution.kind == "ray" else 1
    return [_bundle(spec.execution)] * workers


def _bundle(execution: ExecutionConfig) -> dict[str, float]:
    """A worker's cores, and its GPU or fraction of one."""
    fraction = gpu_fraction(execution)
    return {"CPU": float(execution.threads), **({"GPU": fraction} if fraction else {})}


def resources_of(config: dict[str, Any]) -> Any:
    """Tune's placement group of a trial."""
    execution = ExecutionConfig.model_validate(json.loads(config["order"])["spec"]["execution"])
    if execution.kind != "ray":
        return tune.PlacementGroupFactory([_bundle(execution)])
    return tune.PlacementGroupFactory([{}, *([_bundle(execution)] * int(execution.workers))])


def check_fits(specs: Sequence[RunSpec], node_cores: Sequence[int], node_gpus: Sequence[int]) -> None:
    """UserError where a trial fits on no node, or a gang not on all of them together; otherwise it would wait for ever."""
    for spec in specs:
        bundles = bundles_of(spec)
        cores = int(bundles[0]["CPU"])
        room = sum(node // cores for node in node_cores)
        if room < len(bundles):
            nodes = f"nodes of {', '.join(map(str, sorted(node_cores, reverse=True)))} cores"
            need = f"{len(bundles)} workers of {cores} cores each" if len(bundles) > 1 else f"{cores} cores on one node"
            raise UserError(
                f"a trial needs {need}; the cluster has {nodes}, which hold {room}",
                field="execution.workers" if len(bundles) > 1 else "execution.threads",
                value=len(bundles) if len(bundles) > 1 else cores,
                hint="lower execution.workers or execution.threads, or join more nodes",
            )
        if spec.execution.device == "cuda":
            workers_per_gpu = spec.execution.workers_per_gpu
            places = sum(min(c // cores, g * workers_per_gpu) for c, g in zip(node_cores, node_gpus, strict=True))
            if places < len(bundles):
                raise UserError(
                    f"a trial needs {len(bundles)} worker(s) with a GPU at execution.workers_per_gpu={workers_per_gpu}; "
                    f"the nodes have {', '.join(map(str, node_gpus))} GPU(s), and room for {places}",
                    field="execution.device",
                    value="cuda",
                    hint="lower execution.workers, raise execution.workers_per_gpu, or set execution.device=cpu",
                )


def node_cores() -> list[int]:
    """Cores of the nodes that are alive."""
    return [int(node["CPU"]) for node in _nodes()] or [0]


def node_gpus() -> list[int]:
    """GPUs of the same nodes."""
    return [int(node.get("GPU", 0)) for node in _nodes()] or [0]


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and int(node["Resources"].get("CPU", 0))]


def check_shared(workspace: Path) -> None:
    """UserError where a node that trials may run on does not see the workspace: their records would be lost with it."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return
    with tempfile.NamedTemporaryFile(prefix=".fleetune-", dir=workspace) as marker:
        asked = {
            node["NodeManagerHostname"]: sees.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(marker.name)
            for node in nodes
        }
        blind = [worker for worker, ref in asked.items() if not ray.get(ref)]
    if blind:
        raise UserError(
            f"is not seen from {', '.join(sorted(blind))}: trials write their runs where they run",
            field="--workspace",
            value=str(workspace),
            hint="put it on storage that all nodes share",
        )


def put(inputs: Mapping[str, Inputs]) -> dict[str, SharedInputs]:
    """Inputs in the object store, each base model once."""
    bases: dict[str, Any] = {}
    shared: dict[str, SharedInputs] = {}
    for key, loaded in inputs.items():
        base = loaded.base.key
        shared[key] = SharedInputs.put(loaded, base=bases.get(base))
        bases[base] = shared[key].base
    return shared


# -- Tune's hooks ------------------------------------------------------------
# Tune stores both with every experiment, in case it is to restore one. The run directories do that here, and a conductor with its
# terminal and its processes cannot be stored.
class _Source(Searcher):
    """Tune asks for trials, the conductor gives them."""

    def __init__(self, conductor: Conductor):
        super().__init__()
        self.conductor = conductor

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        order = self.conductor.next_order()
        if order is not None:
            return {"order": order.to_json()}
        return Searcher.FINISHED if self.conductor.is_exhausted() else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Callback(tune.Callback):
    """What becomes of trials, told to the conductor."""

    def __init__(self, conductor: Conductor):
        self.conductor = conductor

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.conductor.on_start(_number(trial))

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if not result.get("done"):
            self.conductor.on_round(_number(trial), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.conductor.on_end(_number(trial), trial.last_result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.conductor.on_death(_number(trial), _reason(trial))


def _number(trial: Any) -> int:
    return int(json.loads(trial.config["order"])["number"])


def _reason(trial: Any) -> str:
    lines = [line for line in str(trial.get_error() or "").strip().splitlines() if line.strip()]
    return f"its process failed {MAX_DEATHS} times" + (f": {lines[-1].strip()}" if lines else "")


def _scheduler(sweep: SweepSpec, known: Sequence[tuple[str, list[dict[str, Any]]]]) -> Any:
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
    for trial_id, rows in known:  # what earlier trials reached at each rung
        for row in rows:
            if row.get(sweep.metric) is not None:
                value = sweep.sign * float(row[sweep.metric])
                trial: Any = SimpleNamespace(trial_id=trial_id)
                scheduler._brackets[0].on_result(trial, int(row["round"]) + 1, value)
    return scheduler
