"""The job of a method that pools all clients' data on the server: a fleet of one, which does what a round's clients would do.

Written as a job like any other, so that the planner, the cost model and the records need to know nothing of it.
"""

from __future__ import annotations

import numpy as np

from fleetune.data.partition import Partition
from fleetune.fleet.availability import AvailabilityConfig
from fleetune.fleet.budgets import BudgetsConfig
from fleetune.spec import RunSpec

NO_LIMIT = 1e18
"""Bytes of memory that the server may use: it is a reference, so it is never refused."""


def server_alone(spec: RunSpec) -> RunSpec:
    """The job with ``fleet.server`` as its only client, and with the steps of all clients of a round for it.

    With ``local.epochs`` it sees as many examples as they would on average: K of N clients see K/N of all examples in a pass.
    """
    per_round, num_clients = spec.rounds.clients_per_round, spec.fleet.num_clients
    epochs = spec.local.epochs and spec.local.epochs * per_round / num_clients
    fleet = {
        "num_clients": 1,
        "devices": {spec.fleet.server: 1.0},
        "dropout": 0.0,
        "availability": AvailabilityConfig(),
        "budgets": BudgetsConfig(memory_bytes=NO_LIMIT),
        "adapt": "none",
    }
    rounds = {"clients_per_round": 1, "close": "all", "deadline_seconds": None, "first_k": None}
    local = {"steps": spec.local.steps * per_round, "epochs": epochs}
    return spec.model_copy(
        update={
            "fleet": spec.fleet.model_copy(update=fleet),
            "rounds": spec.rounds.model_copy(update=rounds),
            "local": spec.local.model_copy(update=local),
        }
    )


def one_shard(num_examples: int) -> Partition:
    """All examples in one hand."""
    return Partition(indices=np.arange(num_examples), offsets=np.array([0, num_examples]))
