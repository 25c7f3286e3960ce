"""Decides every ``auto`` of a job's execution for the nodes that are there, and refuses a job that they have no room for."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.errors import UserError
from fleetune.spec import RunSpec
from fleetune.spec.run_config import ExecutionConfig
from fleetune.training.device import can_compile

MAX_COHORT = 16
# Padded tokens of one step of a cohort on processors. Measured (docs/design/benchmarks.md): matrix products are efficient well
# below that, and a stack of 16 takes longer per client than one of 4 or 8 if each has hundreds of tokens. Not measured on GPUs.
MAX_STEP_TOKENS = 4096


def resolve_execution(spec: RunSpec, *, node_cores: Sequence[int], node_gpus: Sequence[int] | None = None) -> RunSpec:
    """Decide every ``auto`` of the execution: as many workers as a round can keep busy, cores shared out, cohorts for all.

    ``node_cores``, ``node_gpus`` (None: there are none): cores and GPUs of each node. A worker lies on one node, so a node of
    c cores holds c // threads of them, and on GPUs no more than ``workers_per_gpu`` for each of its GPUs. Raises UserError if the
    job names more than there is room for.
    """
    gpus = list(node_gpus) if node_gpus is not None else [0] * len(node_cores)
    device = spec.execution.device
    if device == "auto":
        device = "cuda" if all(gpus) and _finds_room(spec, node_cores, gpus) else "cpu"
    if device == "cuda" and not any(gpus):
        raise UserError(
            "there is no GPU that PyTorch can use" if len(gpus) == 1 else "no node has a GPU",
            field="execution.device",
            value="cuda",
            hint="set it to auto or cpu, or run where a GPU and a PyTorch built for it are",
        )
    most_workers = [n * spec.execution.workers_per_gpu for n in gpus] if device == "cuda" else list(node_cores)
    spec = _resolved(spec, device, node_cores, most_workers)
    chosen = spec.execution
    if (
        device == "cuda"
        and chosen.kind == "ray"
        and int(chosen.workers) > _room(int(chosen.threads), node_cores, most_workers)
    ):
        raise UserError(
            f"{chosen.workers} workers need more than the {sum(gpus)} GPU(s) there are, "
            f"at execution.workers_per_gpu={chosen.workers_per_gpu}",
            field="execution.device",
            value="cuda",
            hint="lower execution.workers, raise execution.workers_per_gpu, or set execution.device=cpu",
        )
    return spec


def num_gpus() -> int:
    """GPUs that PyTorch can use in this process."""
    import torch

    return torch.cuda.device_count()


def gpu_fraction(execution: ExecutionConfig) -> float:
    """GPUs that each worker asks Ray for, which counts them in ten-thousandths."""
    return (10_000 // execution.workers_per_gpu) / 10_000 if execution.device == "cuda" else 0.0


def _room(threads: int, node_cores: Sequence[int], most_workers: Sequence[int]) -> int:
    """Workers that fit on the nodes; ``most_workers``: how many each node may hold, whatever their threads."""
    # Counted node by node: the cores that are left over on two nodes do not make room for one more worker.
    return sum(min(cores // threads, most) for cores, most in zip(node_cores, most_workers, strict=True))


def _finds_room(spec: RunSpec, node_cores: Sequence[int], gpus: Sequence[int]) -> bool:
    """True if as many workers as the job names fit on the GPUs."""
    chosen = spec.execution
    threads = 1 if chosen.threads == "auto" else int(chosen.threads)
    most_workers = [n * chosen.workers_per_gpu for n in gpus]
    return (
        chosen.kind == "serial"
        or chosen.workers == "auto"
        or int(chosen.workers) <= _room(threads, node_cores, most_workers)
    )


def _resolved(spec: RunSpec, device: str, node_cores: Sequence[int], most_workers: Sequence[int]) -> RunSpec:
    """The spec with everything decided; ``most_workers``: how many each node may hold, whatever their threads."""
    chosen = spec.execution
    per_round = 1 if spec.method.traits.pooled else spec.rounds.clients_per_round
    if chosen.workers != "auto" and int(chosen.workers) > _room(1, node_cores, most_workers):
        # They do not fit. Serially, one process stands for all of them; on Ray, the caller refuses the job.
        most_workers = node_cores
    if chosen.threads != "auto":
        threads = int(chosen.threads)
    else:
        wanted = int(chosen.workers) if chosen.workers != "auto" else min(_room(1, node_cores, most_workers), per_round)
        fitting = (t for t in range(max(node_cores), 0, -1) if t == 1 or _room(t, node_cores, most_workers) >= wanted)
        threads = next(fitting)
    room = _room(threads, node_cores, most_workers)
    workers = int(chosen.workers) if chosen.workers != "auto" else max(1, min(room, per_round))
    if workers > _room(threads, node_cores, node_cores):
        raise UserError(
            f"workers of execution.threads={threads} do not fit on nodes of {', '.join(map(str, node_cores))} cores",
            field="execution.workers",
            value=workers,
            hint="lower one of them, or set one to auto",
        )
    per_worker = -(-per_round // workers)
    most = MAX_COHORT
    if device == "cpu":
        most = min(most, max(1, MAX_STEP_TOKENS // (spec.local.batch_size * spec.data.max_tokens)))
    num_cohorts = -(-per_worker // most)  # per worker, so that all workers get equally many
    cohort = int(chosen.cohort) if chosen.cohort != "auto" else -(-per_worker // num_cohorts)
    kind = (
        chosen.kind
        if chosen.kind != "auto"
        else ("ray" if workers > 1 and not spec.method.traits.coupled else "serial")
    )
    values = {"kind": kind, "workers": workers, "threads": threads, "cohort": cohort, "device": device}
    values["kernels"] = _kernels(chosen, device)
    return spec.model_copy(update={"execution": chosen.model_copy(update=values)})


def _kernels(chosen: ExecutionConfig, device: str) -> str:
    has_use = device == "cpu" and chosen.precision == "fp32"
    if chosen.kernels == "compiled" and not has_use:
        raise UserError(
            f"compiled kernels are for fp32 on processors, and this run computes in {chosen.precision} on {device}",
            field="execution.kernels",
            value="compiled",
            hint="set it to auto or torch",
        )
    if chosen.kernels != "auto":
        return chosen.kernels
    return "compiled" if has_use and can_compile() else "torch"
