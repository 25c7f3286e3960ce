"""Many trials that write at once, and one process that brings them all into MLflow: how far behind it is, and what it costs.

python benchmarks/tracking.py                                                          # an SQLite store
python tests/support/services.py python benchmarks/tracking.py --uri '$MLFLOW_TRACKING_URI'    # a server on PostgreSQL and S3
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import measure

NUM_CLIENTS = 20


def write_round(run: Any, number: int) -> None:
    """A finished round as a coordinator writes it."""
    row = {"round": number, "stage": 0, "num_clients": NUM_CLIENTS, "num_ok": NUM_CLIENTS, "num_oom": 0}
    row |= {"train_loss": 1.0 / number, "eval_loss": 1.0 / (number + 1), "eval_accuracy": 0.5}
    row |= {"sim_seconds": 10.0 * number, "wall_seconds": 1.0, "uplink_bytes": 10**6, "downlink_bytes": 10**6}
    row |= {"energy_joules": 100.0, "num_dropped": 0, "num_late": 0}
    columns = {
        "client_id": np.arange(NUM_CLIENTS),
        "device": ["jetson-nano"] * NUM_CLIENTS,
        "status": ["ok"] * NUM_CLIENTS,
    }
    columns |= {name: np.ones(NUM_CLIENTS) for name in ("compute_seconds", "downlink_seconds", "uplink_seconds")}
    columns |= {"sim_seconds": np.full(NUM_CLIENTS, 3.0), "energy_joules": np.full(NUM_CLIENTS, 5.0)}
    columns |= {name: np.full(NUM_CLIENTS, 10**9) for name in ("peak_memory_bytes", "budget_bytes", "weights_bytes")}
    run.append_round(row, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds-per-round", type=float, default=2.0)
    parser.add_argument("--uri", help="an MLflow server; default: an SQLite store")
    args = parser.parse_args()

    from fleetune.records import RunDirectory, SweepDirectory
    from fleetune.spec import from_dict
    from fleetune.tracking.stream import RecordStream
    from fleetune.tracking.tracker import Tracker

    uri = os.path.expandvars(args.uri) if args.uri else None
    with tempfile.TemporaryDirectory(prefix="fleetune-bench-") as folder:
        name = f"tracking-{os.getpid()}"
        values = from_dict({"name": name, "tracking": {"uri": uri}}).to_dict()
        sweep = SweepDirectory.create(folder, "s", {"name": name, "base": values}, directory=Path(folder) / "sweeps",
                                      meta={"sweep": name})  # fmt: skip
        warnings: list[str] = []
        follower = RecordStream.start(warn=warnings.append)
        child = psutil.Process(follower._process.pid)
        started = time.perf_counter()
        follower.watch(sweep.path)
        runs = []
        for seed in range(args.trials):
            meta = {"sweep": name, "parent_run_dir": "../../sweeps/s", "overrides": {"seed": seed}}
            runs.append(RunDirectory.create(folder, f"t{seed}", {**values, "seed": seed}, meta=meta))
            follower.watch(runs[-1].path)

        def trial(run: RunDirectory) -> None:
            for number in range(1, args.rounds + 1):
                write_round(run, number)
                time.sleep(args.seconds_per_round)
            run.consolidate()
            run.write_result({"status": "finished", "metrics": {}, "totals": {}})

        threads = [threading.Thread(target=trial, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sweep.write_result({"status": "finished", "metrics": {}})
        written = time.perf_counter()
        complete = all(follower.finished(run.path, timeout_seconds=600) for run in [*runs, sweep])
        synced = time.perf_counter()
        cpu = child.cpu_times()
        follower.close()
        client_of = Tracker(sweep, uri=uri)
        client_of.run_id()
        stored = client_of._client.search_runs([client_of._ids[0]], max_results=5000)
        steps = [len(client_of._client.get_metric_history(run.info.run_id, "train/loss")) for run in stored]
    rows = [
        {"what": "store", "value": "SQLite" if uri is None else "server", "unit": ""},
        {"what": "trials, all at once", "value": args.trials, "unit": ""},
        {"what": "rounds each, one every " + str(args.seconds_per_round) + " s", "value": args.rounds, "unit": ""},
        {"what": "first round to last result", "value": written - started, "unit": "s"},
        {"what": "last result to all in the store", "value": synced - written, "unit": "s"},
        {"what": "processor time of the feeding process", "value": cpu.user + cpu.system, "unit": "s"},
        {"what": "the same for each trial", "value": (cpu.user + cpu.system) / args.trials, "unit": "s"},
        {"what": "runs in the store with every round once", "value": steps.count(args.rounds), "unit": ""},
        {"what": "runs in the store", "value": len(stored), "unit": ""},
        {"what": "all arrived", "value": str(complete), "unit": ""},
        {"what": "warnings", "value": len(warnings), "unit": ""},
    ]
    measure.report("tracking", rows)
    assert complete
    assert steps.count(args.rounds) == args.trials
    assert len(stored) == args.trials + 1


if __name__ == "__main__":
    main()
