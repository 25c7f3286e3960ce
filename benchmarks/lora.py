"""The LoRA workload: 100 clients a round, each 4 SGD steps (batch 4, 64 tokens) of LoRA r = 8 on q and v of a random Llama.

python benchmarks/lora.py                                # 1 and 2 workers, and one process without Ray
python benchmarks/lora.py --workers 2 --rounds 3 --cohort 8
python benchmarks/lora.py --workers 2 --device cuda --workers-per-gpu 2 --precision bf16
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import workload


def timed(
    *, kind: str, num_workers: int, cohort: int | str, num_clients: int, num_rounds: int, where: dict[str, Any]
) -> dict[str, Any]:
    """Milliseconds per client-round with one thread per worker. ``where``: device, precision, workers per GPU."""
    spec = workload.spec(
        {
            "fleet.num_clients": num_clients,
            "rounds.clients_per_round": num_clients,
            "rounds.num_rounds": num_rounds + 2,
            "execution": {"kind": kind, "workers": num_workers, "cohort": cohort, "threads": 1, **where},
        }
    )
    out = workload.timed_rounds(spec, workload.inputs(spec, workload.Llama().build()))
    median, best = measure.median_and_min(out.round_seconds)
    return {
        "system": f"fleetune {kind}",
        "workers": num_workers,
        "cohort": cohort,
        **where,
        "ms_per_client": 1e3 * median / num_clients,
        "best_ms_per_client": 1e3 * best / num_clients,
        "clients_per_second": num_clients / median,
        "train_loss": out.train_loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("ray", "serial"), default="ray")
    parser.add_argument("--workers", type=int, help="only this many workers")
    parser.add_argument("--cohort", default="auto", help="clients that train stacked; 1: one by one")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4, help="rounds that are measured, beside the first and the last")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--kernels", choices=("auto", "compiled", "torch"), default="auto")
    parser.add_argument("--workers-per-gpu", type=int, default=2)
    args = parser.parse_args()
    where = {"device": args.device, "precision": args.precision, "workers_per_gpu": args.workers_per_gpu}
    where["kernels"] = args.kernels
    cohort = args.cohort if args.cohort == "auto" else int(args.cohort)
    cases = [(args.kind, args.workers)] if args.workers else [("serial", 1), ("ray", 1), ("ray", 2)]
    rows = [
        timed(
            kind=kind, num_workers=workers, cohort=cohort, num_clients=args.clients, num_rounds=args.rounds, where=where
        )
        for kind, workers in cases
    ]
    if {("ray", 1), ("ray", 2)} <= set(cases):
        one, two = (row["clients_per_second"] for row in rows if row["system"] == "fleetune ray")
        rows[-1]["of_twice_one_host"] = two / (2 * one)
    measure.report("lora", rows)


if __name__ == "__main__":
    main()
