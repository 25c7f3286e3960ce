"""The time of split work whose parts overlap: client, both links and server are busy at once, on different micro-batches.

In sequence a turn is the sum of its parts. Pipelined, what belongs to the steps takes as long as the slowest of the client's
computing, the server's, and the cut's transfers each way; before and after it the adapter crosses the link. Filling and
draining the pipeline is not counted, so this is the best that overlapping can do.
"""

from __future__ import annotations

import numpy as np


def overlapped(
    costs: dict[str, np.ndarray],
    *,
    adapter_down_seconds: np.ndarray,
    adapter_up_seconds: np.ndarray,
    idle_watts: np.ndarray,
) -> dict[str, np.ndarray]:
    """The costs (n,) of turns in sequence, with their parts overlapped: shorter turns, and less idle power."""
    steps = np.maximum.reduce(
        [
            costs["compute_seconds"],
            costs["server_seconds"],
            costs["downlink_seconds"] - adapter_down_seconds,
            costs["uplink_seconds"] - adapter_up_seconds,
        ]
    )
    turn = adapter_down_seconds + steps + adapter_up_seconds
    saved = idle_watts * (costs["sim_seconds"] - turn)
    return {**costs, "sim_seconds": turn, "energy_joules": costs["energy_joules"] - saved}
