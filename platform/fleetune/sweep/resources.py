"""The part of the cluster that a trial takes, and the checks that the nodes have it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fleetune.engine.launch.resolve import gpu_fraction
from fleetune.errors import UserError
from fleetune.spec import RunSpec
from fleetune.spec.run_config import ExecutionConfig


def bundles_of(spec: RunSpec) -> list[dict[str, float]]:
    """The resources of a trial: one bundle for its process, or one for each worker of a gang.

    The coordinator of a gang computes next to nothing and takes none.
    """
    workers = int(spec.execution.workers) if spec.execution.kind == "ray" else 1
    return [_bundle(spec.execution)] * workers


def placement_group(config: dict[str, Any]) -> Any:
    """Tune's placement group for the trial in ``config["order"]``."""
    execution = ExecutionConfig.model_validate(json.loads(config["order"])["spec"]["execution"])
    if execution.kind != "ray":
        return tune.PlacementGroupFactory([_bundle(execution)])
    # The first bundle is that of the trial's own process, the gang's coordinator.
    return tune.PlacementGroupFactory([{}, *([_bundle(execution)] * int(execution.workers))])


def _bundle(execution: ExecutionConfig) -> dict[str, float]:
    """A worker's cores, and its GPU or share of one."""
    share = gpu_fraction(execution)
    return {"CPU": float(execution.threads), **({"GPU": share} if share else {})}


def check_fits(specs: Sequence[RunSpec], node_cores: Sequence[int], node_gpus: Sequence[int]) -> None:
    """Raises UserError if a trial fits on no node, or a gang not on all nodes together: it would wait for ever.

    ``node_cores`` and ``node_gpus`` name the same nodes in the same order.
    """
    for spec in specs:
        _check_cores(spec, node_cores)
        if spec.execution.device == "cuda":
            _check_gpus(spec, node_cores, node_gpus)


def _check_cores(spec: RunSpec, node_cores: Sequence[int]) -> None:
    bundles = bundles_of(spec)
    cores = int(bundles[0]["CPU"])
    room = sum(node // cores for node in node_cores)
    if room >= len(bundles):
        return
    is_gang = len(bundles) > 1
    nodes = f"nodes of {', '.join(map(str, sorted(node_cores, reverse=True)))} cores"
    need = f"{len(bundles)} workers of {cores} cores each" if is_gang else f"{cores} cores on one node"
    raise UserError(
        f"a trial needs {need}; the cluster has {nodes}, which hold {room}",
        field="execution.workers" if is_gang else "execution.threads",
        value=len(bundles) if is_gang else cores,
        hint="lower execution.workers or execution.threads, or join more nodes",
    )


def _check_gpus(spec: RunSpec, node_cores: Sequence[int], node_gpus: Sequence[int]) -> None:
    bundles = bundles_of(spec)
    cores = int(bundles[0]["CPU"])
    workers_per_gpu = spec.execution.workers_per_gpu
    room = sum(min(c // cores, g * workers_per_gpu) for c, g in zip(node_cores, node_gpus, strict=True))
    if room < len(bundles):
        raise UserError(
            f"a trial needs {len(bundles)} worker(s) with a GPU at execution.workers_per_gpu={workers_per_gpu}; "
            f"the nodes have {', '.join(map(str, node_gpus))} GPU(s), and room for {room}",
            field="execution.device",
            value="cuda",
            hint="lower execution.workers, raise execution.workers_per_gpu, or set execution.device=cpu",
        )


def node_cores() -> list[int]:
    """Cores of each node that is alive; ``[0]`` if no node has any."""
    return [int(node["CPU"]) for node in _nodes()] or [0]


def node_gpus() -> list[int]:
    """GPUs of the same nodes, in the same order."""
    return [int(node.get("GPU", 0)) for node in _nodes()] or [0]


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and int(node["Resources"].get("CPU", 0))]


def check_shared(workspace: Path) -> None:
    """Raises UserError if a node that trials may run on does not see the workspace: their records would be lost with it."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return
    with tempfile.NamedTemporaryFile(prefix=".fleetune-", dir=workspace) as marker:
        answers = {
            node["NodeManagerHostname"]: _sees.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(marker.name)
            for node in nodes
        }
        blind = [machine for machine, answer in answers.items() if not ray.get(answer)]
    if blind:
        raise UserError(
            f"is not seen from {', '.join(sorted(blind))}: trials write their runs where they run",
            field="--workspace",
            value=str(workspace),
            hint="put it on storage that all nodes share",
        )


@ray.remote(num_cpus=0)
def _sees(path: str) -> bool:
    """True if the node that runs this sees a file that the driver wrote."""
    return Path(path).is_file()
