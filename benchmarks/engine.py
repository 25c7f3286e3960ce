"""What a round costs where the clients do nothing: sampling, batches, costs, sending, sums, records, checkpoint.

python benchmarks/engine.py                       # 2, 100, 1,000 and 10,000 clients per round, 64 KiB states; 4.5 MB
python benchmarks/engine.py --clients 100 --elements 16384 --rounds 20
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import workload
from noop import NoOpConfig

SMALL, LARGE = 16384, 1126400  # fp32 numbers: 64 KiB, as the LoRA workload's adapter has, and 4.5 MB
CASES = ((2, SMALL), (100, SMALL), (1000, SMALL), (10000, SMALL), (100, LARGE))
"""(clients per round, fp32 numbers of the state)"""


def timed(num_clients: int, method: NoOpConfig, *, num_rounds: int, execution: dict[str, Any]) -> dict[str, Any]:
    """One case: milliseconds per client-round."""
    overrides = {
        "fleet.num_clients": num_clients,
        "rounds.clients_per_round": num_clients,
        "rounds.num_rounds": num_rounds + 2,
        **{f"execution.{name}": value for name, value in execution.items()},
    }
    spec = workload.spec(overrides)
    spec = spec.model_copy(update={"method": method})
    out = workload.timed_rounds(spec, workload.inputs(spec, workload.Llama().build()))
    median, best = measure.median_and_min(out.round_seconds)
    return {
        "clients": num_clients,
        "method": method.name,
        "state_bytes": 4 * method.num_elements,
        "round_ms": 1e3 * median,
        "ms_per_client": 1e3 * median / num_clients,
        "best_ms_per_client": 1e3 * best / num_clients,
        "first_round_s": out.first_round_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("ray", "serial"), default="ray")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=10, help="rounds that are measured, beside the first and the last"
    )
    parser.add_argument("--clients", type=int, help="only this case, with --elements")
    parser.add_argument("--elements", type=int, default=SMALL, help="fp32 numbers of the state")
    parser.add_argument("--batches", action="store_true", help="draw, price and send every client's batches as well")
    args = parser.parse_args()
    execution = {"kind": args.kind, "hosts": args.hosts, "threads": 1}
    cases = CASES if args.clients is None else ((args.clients, args.elements),)
    name = "noop-batches" if args.batches else "noop"
    rows = []
    for num_clients, num_elements in cases:
        num_rounds = args.rounds if num_clients <= 1000 else 3
        method = NoOpConfig(name=name, num_elements=num_elements)
        rows.append(timed(num_clients, method, num_rounds=num_rounds, execution=execution))
    measure.report("engine", rows)


if __name__ == "__main__":
    main()
