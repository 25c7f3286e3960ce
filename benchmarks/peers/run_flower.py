"""Flower's simulation runtime with two Ray workers of one core each."""

import json
import os
import sys
from pathlib import Path

import work


def main() -> None:
    parser = work.arguments(__doc__)
    parser.add_argument("--keep-model", action="store_true", help="keep the model in the worker between clients")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    here = str(Path(__file__).parent)
    settings = {**vars(args)}
    os.environ.update(
        FLEETUNE_BENCH_FLOWER=json.dumps(settings),
        PYTHONPATH=os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        FLWR_TELEMETRY_ENABLED="0",
        RAY_USAGE_STATS_ENABLED="0",
    )
    sys.path.insert(0, here)
    from flower_app import client_app, server_app
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=args.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": args.workers},
        },
    )


if __name__ == "__main__":
    main()
