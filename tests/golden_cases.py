"""What `golden.py` runs, and how names have changed since a recording was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

JOBS = Path(__file__).resolve().parent.parent / "jobs" / "methods"

Settings = dict[str, Any]

# Short enough that all cases take some minutes on two cores, long enough for every path: four rounds, stages that grow,
# evaluations beside the next round, clients that come back to what they kept.
SHORT: Settings = {
    "rounds.num_rounds": 4,
    "rounds.clients_per_round": 4,
    "fleet.num_clients": 8,
    "local.steps": 2,
    "local.batch_size": 4,
    "data.num_eval_examples": 16,
    "evaluation.every": 2,
    "evaluation.generate": False,
    "execution.cohort": 2,
    "execution.threads": 1,
    "execution.device": "cpu",
    "execution.kernels": "torch",
    "tracking.enabled": False,
}
SERIAL: Settings = {"execution.kind": "serial"}
RAY: Settings = {"execution.kind": "ray", "execution.workers": 2}

LLAMA2_7B: Settings = {"cost.model": "llama2-7b", "cost.weights": "nf4", "cost.precision": "bf16"}

# What no method's own job touches: other rules of a round, smaller workloads, other costs.
VARIANTS: dict[str, tuple[str, Settings]] = {
    "generates": ("fedit", {"evaluation.generate": True, "evaluation.max_new_tokens": 8}),
    "compiled": ("fedit", {"execution.kernels": "compiled"}),
    "epochs": ("fedit", {"local.epochs": 0.05}),
    "deadline": ("fedsa-lora", {"rounds.close": "deadline", "rounds.deadline_seconds": 2.0, "fleet.network": "lte"}),
    "first k": ("fedit", {"rounds.close": "first_k", "rounds.first_k": 2}),
    "comes and goes": (
        "fedit",
        {"fleet.availability": {"kind": "bernoulli", "probability": 0.6}, "fleet.dropout": 0.3},
    ),
    "smaller ranks": ("fedsa-lora", {"fleet.adapt": "rank", "fleet.budgets": {"bytes_per_round": 600_000}}),
    "fewer blocks": ("devft", {"fleet.adapt": "capacity", **LLAMA2_7B}),
    "out of memory": ("fedit", LLAMA2_7B),
    "devft over fedsa-lora": ("devft", {"method.aggregation": "fedsa-lora"}),
    "split in turn": ("split-lora", {"method.server": "in_turn"}),
    "quantised": ("fedit", {"model.quantization": "nf4", "rounds.num_rounds": 2}),
}


def cases() -> dict[str, tuple[str, Settings]]:
    """Name -> (method whose job file it is, settings)."""
    methods = sorted(path.stem for path in JOBS.glob("*.yaml"))
    plain = {f"{name}, serial": (name, {**SHORT, **SERIAL}) for name in methods}
    variants = {name: (method, {**SHORT, **SERIAL, **changed}) for name, (method, changed) in VARIANTS.items()}
    on_ray = {f"{name}, ray": (name, {**SHORT, **RAY}) for name in methods}
    return {**plain, **variants, **on_ray}


# -- names -----------------------------------------------------------------------------------------------------------------
# A change that renames a field, a column, a metric or a tensor enters the old and the new name here, in the commit that
# renames it. Recordings made before are then read under the new name.
RENAMED: dict[str, str] = {
    "places": "slots",  # tensor of the checkpoint: where each client's row lies in the client store
    "hosts": "workers",
    "hosts_per_gpu": "workers_per_gpu",
}
ADDED: set[str] = {
    "waiting_seconds",  # in plans
    "server_seconds",  # in plans: one table of columns says what is summed up
    "num_personal",  # in rounds.parquet, and so are the next ones; empty unless clients are evaluated (evaluation.personal)
    *(f"eval_personal_{name}{end}" for name in ("loss", "accuracy") for end in ("", "_std", "_worst")),
}
"""Names that recordings made before do not have."""
GONE: set[str] = set()
"""Names that only recordings made before have."""

# Fields of the job file: (new, old). A tree that does not know the new one is given the old one.
FIELDS: tuple[tuple[str, str], ...] = (("execution.workers", "execution.hosts"),)
