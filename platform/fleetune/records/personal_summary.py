"""The quality of clients' own models, summed up over clients: the same numbers in tables and reports."""

from __future__ import annotations

import math

import numpy as np

WORST_FRACTION = 0.1
"""Of the clients, the part whose quality is lowest; at least one client."""


def summary(name: str, values: np.ndarray, *, high_is_bad: bool) -> dict[str, float]:
    """Mean, standard deviation and mean of the worst tenth of one value per client, (n,) float; every client counts alike.

    The deviation is that of these n clients, not an estimate for others: the root of the mean squared distance from the mean.
    """
    num_worst = math.ceil(WORST_FRACTION * len(values))
    ordered = np.sort(values)  # NaN comes last
    worst = ordered[-num_worst:] if high_is_bad else ordered[:num_worst]
    return {name: float(values.mean()), f"{name}_std": float(values.std()), f"{name}_worst": float(worst.mean())}
