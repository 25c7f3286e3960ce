"""What a round costs where the clients do nothing: sampling, batches, costs, sending, sums, records, checkpoint.

python benchmarks/engine.py                       # 2, 100, 1,000 and 10,000 clients per round, 64 KiB states; 4.5 MB
python benchmarks/engine.py --clients 100 --elements 16384 --rounds 20
python benchmarks/engine.py --files               # checksums and fsync: off, each waited for, and beside the next round
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
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


FILES = ("off", "unsynced", "inline", "overlapped")
"""Neither checksums nor fsync; checksums alone; both, each fsync waited for; both as users have them, beside the next round."""


def with_files(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The four ways of writing in turn, several times, in this process: other load on the machine meets them all."""
    from fleetune.files import SWITCH

    fsync, seconds = os.fsync, []

    def timed_fsync(descriptor: int) -> None:
        started = time.perf_counter()
        fsync(descriptor)
        time.sleep(max(0.0, started + 1e-3 * args.fsync_ms - time.perf_counter()))
        seconds.append(time.perf_counter() - started)

    os.fsync = timed_fsync
    rows = []
    for num_clients, num_elements in ((100, SMALL), (100, LARGE)):
        method = NoOpConfig(name="noop", num_elements=num_elements)
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in FILES}
        for _ in range(args.repeats):
            for way in FILES:
                os.environ[SWITCH] = way
                seconds.clear()
                row = timed(num_clients, method, num_rounds=args.rounds, execution={"kind": "serial", "threads": 1})
                row.update(fsyncs=len(seconds) / (args.rounds + 2), fsync_ms=1e3 * sum(seconds) / (args.rounds + 2))
                found[way].append(row)
        off = statistics.median(row["round_ms"] for row in found["off"])
        for way, several in found.items():
            round_ms = statistics.median(row["round_ms"] for row in several)
            rows.append(
                {
                    "files": way,
                    "clients": num_clients,
                    "state_bytes": 4 * num_elements,
                    "round_ms": round_ms,
                    "best_round_ms": min(num_clients * row["best_ms_per_client"] for row in several),
                    "to_off": round_ms / off,
                    "fsyncs_per_round": statistics.median(row["fsyncs"] for row in several),
                    "fsync_ms_per_round": statistics.median(row["fsync_ms"] for row in several),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("ray", "serial"), default="ray")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=10, help="rounds that are measured, beside the first and the last"
    )
    parser.add_argument("--clients", type=int, help="only this case, with --elements")
    parser.add_argument("--elements", type=int, default=SMALL, help="fp32 numbers of the state")
    parser.add_argument("--batches", action="store_true", help="draw, price and send every client's batches as well")
    parser.add_argument("--files", action="store_true", help="the cost of checksums and fsync, serially")
    parser.add_argument("--repeats", type=int, default=5, help="of --files")
    parser.add_argument(
        "--fsync-ms", type=float, default=0.0, help="of --files: as on a disk whose fsync takes so long"
    )
    args = parser.parse_args()
    if args.files:
        measure.report("engine, files", with_files(args))
        return
    execution = {"kind": args.kind, "workers": args.workers, "threads": 1}
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
