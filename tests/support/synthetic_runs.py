"""Plausible run directories for tests of records, tracking and reports: no model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.records import RunDirectory

GIB = 1 << 30
# device -> (share of the fleet, budget in GiB, FLOP/s)
DEVICES = {
    "jetson-nano": (0.5, 3.0, 2.4e11),
    "jetson-orin-nano-8gb": (0.3, 6.4, 4e12),
    "jetson-agx-orin-64gb": (0.2, 57.0, 2.6e13),
}


def make_spec(
    *, method: str = "devft", num_clients: int = 20, num_rounds: int = 12, seed: int = 0, **method_fields: Any
):
    return {
        "name": f"{method}-quickstart",
        "seed": seed,
        "model": {
            "base": "micro-llama",
            "quantization": "none",
            "lora": {"rank": 8, "alpha": 16, "targets": "all-linear"},
        },
        "data": {
            "dataset": "micro-reasoning",
            "partition": {"kind": "dirichlet", "alpha": 0.5},
            "max_tokens": 128,
        },
        "fleet": {
            "num_clients": num_clients,
            "devices": {name: share for name, (share, _, _) in DEVICES.items()},
            "network": "wifi",
        },
        "rounds": {"num_rounds": num_rounds, "clients_per_round": num_clients, "close": "all"},
        "local": {"steps": 8, "batch_size": 8, "learning_rate": 1e-3},
        "method": {"name": method, **method_fields},
        "evaluation": {"every": 3},
        "tracking": {"uri": None, "experiment": None},
    }


def rounds_of(
    spec: dict[str, Any], *, evaluate: bool = True, all_oom: bool = False
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(round's row, clients' columns) of each round: a submodel that grows from 4 to 16 blocks, clients of
    three devices.
    """
    num_clients, num_rounds = spec["fleet"]["num_clients"], spec["rounds"]["num_rounds"]
    grows = spec["method"]["name"] == "devft"
    names = list(DEVICES)
    counts = np.diff(np.rint(np.cumsum([0.0] + [DEVICES[name][0] for name in names]) * num_clients)).astype(int)
    device = np.repeat(np.arange(len(names)), counts)
    budget = np.array([DEVICES[name][1] * GIB for name in names])[device]
    speed = np.array([DEVICES[name][2] for name in names])[device]
    sim_seconds = 0.0
    for round_idx in range(num_rounds):
        rng = np.random.default_rng([spec["seed"], round_idx])
        stage = min(2, 3 * round_idx // num_rounds) if grows else 0
        depth = 4 * 2**stage if grows else 16
        peak = (1.2 + 0.22 * depth) * GIB * rng.uniform(0.95, 1.05, num_clients)
        oom = np.full(num_clients, True) if all_oom else peak > budget
        ran = ~oom
        tokens = np.where(ran, rng.integers(3000, 8000, num_clients), 0)
        flops = 4.0 * tokens * 2.1e7 * depth
        downlink, uplink = np.where(ran, 40_000 * depth, 0), np.where(ran, 40_000 * depth, 0)
        compute, down, up = flops / speed * 4, downlink / 3e6, uplink / 1e6
        turn = down + compute + up
        loss = 0.6 + 1.8 * np.exp(-(round_idx + 1) / (0.35 * num_rounds)) + rng.normal(0, 0.03, num_clients)
        sim_seconds += float(turn.max())
        energy = compute * 12.0 + (down + up) * 3.0
        row = {
            "round": round_idx + 1,
            "stage": stage,
            "num_clients": num_clients,
            "num_ok": int(ran.sum()),
            "num_oom": int(oom.sum()),
            "num_dropped": 0,
            "num_late": 0,
            "train_loss": float(loss[ran].mean()) if ran.any() else None,
            "sim_seconds": sim_seconds,
            "wall_seconds": 0.2,
            "uplink_bytes": int(uplink.sum()),
            "downlink_bytes": int(downlink.sum()),
            "energy_joules": float(energy.sum()),
            "depth": depth,
        }
        if evaluate and (round_idx + 1) % spec["evaluation"]["every"] == 0:
            share = (round_idx + 1) / num_rounds
            row |= {
                "eval_loss": 0.7 + np.exp(-3 * share),
                "eval_accuracy": 0.25 + 0.5 * share + 0.02 * float(rng.normal()),
            }
        clients = {
            "client_id": np.arange(num_clients),
            "device": [names[i] for i in device],
            "status": ["oom" if is_oom else "ok" for is_oom in oom],
            "refused_by": ["memory" if is_oom else None for is_oom in oom],
            "refused_hint": ["batch size 4" if is_oom else None for is_oom in oom],
            "shard_examples": tokens // 100,
            "num_examples": tokens // 100,
            "num_tokens": tokens,
            "flops": np.where(ran, flops, 0.0),
            "server_flops": np.zeros(num_clients),
            "peak_memory_bytes": peak,
            "weights_bytes": 0.6 * peak,
            "adapter_bytes": 0.02 * peak,
            "gradient_bytes": 0.02 * peak,
            "optimizer_bytes": 0.04 * peak,
            "activation_bytes": 0.32 * peak,
            "budget_bytes": budget,
            "downlink_bytes": downlink,
            "uplink_bytes": uplink,
            "compute_seconds": compute,
            "downlink_seconds": down,
            "uplink_seconds": up,
            "sim_seconds": turn,
            "energy_joules": energy,
            "train_loss": np.where(ran, loss, np.nan),
            "wall_seconds": np.full(num_clients, 0.01),
        }
        yield row, clients


def make_run(
    workspace: Path,
    run_id: str,
    *,
    spec: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    evaluate: bool = True,
    all_oom: bool = False,
    finish: bool = True,
) -> RunDirectory:
    """A run of a few rounds, finished unless ``finish`` is false."""
    spec = spec or make_spec()
    known = {
        "git_commit": "0123abc",
        "spec_hash": "ab12cd",
        "dataset": {"name": "micro-reasoning", "digest": "f00d", "num_examples": 2000},
        "model": {"trained": "micro-llama", "costed": "llama2-7b"},
    }
    run = RunDirectory.create(workspace, run_id, spec, meta={**known, **(meta or {})})
    for row, clients in rounds_of(spec, evaluate=evaluate, all_oom=all_oom):
        run.append_round(row, clients)
    if finish:
        run.consolidate()
        (run.path / "adapter").mkdir()
        (run.path / "adapter" / "adapter_config.json").write_text("{}")
        rounds = run.rounds()
        totals = {
            "sim_seconds": float(rounds["sim_seconds"].iloc[-1]),
            "uplink_bytes": int(rounds["uplink_bytes"].sum()),
        }
        accuracy = rounds["eval_accuracy"].dropna()
        metrics = {"eval_accuracy": float(accuracy.iloc[-1])} if len(accuracy) else {}
        run.write_result({"status": "finished", "metrics": metrics, "totals": totals})
    return run
