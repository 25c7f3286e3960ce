"""Where the memory goes: per idle client, per worker, per node. Linux: it reads /proc.

    python benchmarks/memory.py                 # about two minutes
    python benchmarks/memory.py --part clients  # only the registered clients

Figures are proportional (PSS): a page that n processes map counts 1/n in each of them, so that sums count every page once.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import measure
import workload
from fleetune.problem import build_problem

STORE = "plasma"  # the object store's file in /dev/shm


def command_line(pid: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def idle_clients() -> list[dict[str, Any]]:
    """What 200,000 more registered clients, each with one example of 64 tokens, add to this process."""
    few, many = 10_000, 210_000
    base = workload.Llama().build()
    kept = []
    taken = []
    for num_clients in (few, few, many):  # the first one pays for imports
        spec = workload.spec({"fleet.num_clients": num_clients, "execution.kind": "serial"})
        gc.collect()
        before = measure.pss_bytes([os.getpid()])
        data = workload.inputs(spec, base, examples_per_client=1)
        kept.append(build_problem(spec, data))
        gc.collect()
        taken.append(measure.pss_bytes([os.getpid()]) - before)
    return [{"what": "an idle registered client", "bytes": (taken[2] - taken[1]) / (many - few)}]


def workers(model: workload.Llama) -> list[dict[str, Any]]:
    """Processes of a run on one worker and on two, and how much of the base model each worker maps and owns."""
    base = model.build()
    weights = sum(t.nbytes for t in base.weights.values())
    rows: list[dict[str, Any]] = [{"what": "base model's weights", "bytes": weights}]
    for num_workers in (1, 2):
        spec = workload.spec(
            {
                "fleet.num_clients": 8,
                "rounds.clients_per_round": 8,
                "rounds.num_rounds": 4,
                "local.steps": 1,
                "local.batch_size": 1,  # the activations are not what is asked for here
                "execution": {"kind": "ray", "workers": num_workers, "threads": 1, "cohort": 4},
            }
        )
        found: dict[str, dict[str, Any]] = {}

        def look(round_idx: int, found: dict[str, dict[str, Any]] = found, num_workers: int = num_workers) -> None:
            if round_idx == 1:
                found.update(_worker_rows(num_workers))

        workload.timed_rounds(spec, workload.inputs(spec, base), after=look)
        rows += found.values()
    return rows


def _worker_rows(num_workers: int) -> dict[str, dict[str, Any]]:
    everyone = measure.descendants(os.getpid())
    names = {pid: command_line(pid) for pid in everyone}
    out: dict[str, dict[str, Any]] = {}
    for pid, name in names.items():
        if name.startswith("ray::RayWorker"):
            mapped = measure.mapping_bytes(pid, path_contains=STORE)
            out[f"{num_workers}/{pid}"] = {
                "what": f"a worker of {num_workers}",
                "bytes": measure.pss_bytes([pid]),
                "store_mapped": mapped["Rss"],
                "store_pss": mapped["Pss"],
                "store_shared": mapped["Shared_Clean"] + mapped["Shared_Dirty"],
                "store_private": mapped["Private_Clean"] + mapped["Private_Dirty"],
            }
    coordinator = [pid for pid, name in names.items() if name.startswith("ray::RayCoordinator")]
    out[f"{num_workers}/coordinator"] = {"what": "coordinator", "bytes": measure.pss_bytes(coordinator)}
    out[f"{num_workers}/all"] = {
        "what": f"everything with {num_workers} worker(s)",
        "bytes": measure.pss_bytes(everyone),
    }
    return out


def many_clients() -> list[dict[str, Any]]:
    """The most that a run with 10,000 registered clients, 100 of them each round, took on two workers."""
    spec = workload.spec({"fleet.num_clients": 10_000, "rounds.num_rounds": 4, "execution.threads": 1})
    with measure.PeakMemory(os.getpid()) as peak:
        workload.timed_rounds(spec, workload.inputs(spec, workload.Llama().build()))
    return [{"what": "10,000 clients, 100 per round, 2 workers: peak", "bytes": peak.bytes}]


def large_replies() -> list[dict[str, Any]]:
    """How far 100 replies of 4.5 MB lift the memory above that of the same engine with replies of 64 bytes."""
    from noop import NoOpConfig

    rows: list[dict[str, Any]] = []
    for name, num_elements in (("64 bytes, first run", 16), ("64 bytes", 16), ("4.5 MB", 1126400)):
        spec = workload.spec({"rounds.num_rounds": 20, "execution.threads": 1})
        spec = spec.model_copy(update={"method": NoOpConfig(num_elements=num_elements)})
        with measure.PeakMemory(os.getpid()) as peak:
            workload.timed_rounds(spec, workload.inputs(spec, workload.Llama().build()))
        rows.append({"what": f"100 replies of {name}: peak", "bytes": peak.bytes})
    rows.append({"what": "4.5 MB above 64 bytes", "bytes": rows[2]["bytes"] - rows[1]["bytes"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("clients", "many", "replies", "workers"), nargs="*")
    args = parser.parse_args()
    parts = {
        "clients": idle_clients,
        "many": many_clients,
        "replies": large_replies,
        "workers": lambda: workers(workload.Llama(num_layers=8, hidden_size=512, intermediate_size=1376, num_heads=8)),
    }
    rows = [row for name, part in parts.items() if not args.part or name in args.part for row in part()]
    for row in rows:
        row.update({name: value / 2**20 for name, value in row.items() if name.startswith("store_")})
        row["MiB"] = row["bytes"] / 2**20
    measure.report("memory", rows)


if __name__ == "__main__":
    main()
