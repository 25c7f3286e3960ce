"""The numbers that figures and reports show: totals of a run, costs per device class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleetune.columns import CLIENT_COLUMNS, ROUND_COLUMNS, UNTRAINED, Column, names
from fleetune.records.run_directory import RunDirectory

if TYPE_CHECKING:
    import pandas as pd

STATUSES = ("oom", "refused", "dropped", "late", "failed")
"""How a turn ends that does not count."""
RUN_COSTS: dict[str, Column] = {column.name: column for column in ROUND_COLUMNS if column.title}
"""What a run costs, by the name of its column."""
SUMS = tuple(column.name for column in ROUND_COLUMNS if column.has_total)
"""Those of them that rounds hold one by one; virtual time is cumulative already."""
_BY_UNIT = ("seconds", "flops", "bytes", "joules")
TURN_COSTS: tuple[Column, ...] = tuple(
    sorted((column for column in CLIENT_COLUMNS if column.title), key=lambda column: _BY_UNIT.index(column.unit))
)
"""What a client's turn costs, in the order of reports: parts of the time before the whole."""


def run_totals(run: RunDirectory) -> dict[str, float | None]:
    """Totals of a run: rounds, accuracy, losses, virtual seconds, bytes, joules and the fraction of turns refused for memory.

    ``eval_accuracy`` is the last one evaluated, ``best_accuracy`` the highest. None: not evaluated, or no round yet.
    """
    rounds = run.rounds()
    turns = float(rounds["num_clients"].sum())

    def last(column: str) -> float | None:
        values = rounds[column].dropna()
        return float(values.iloc[-1]) if len(values) else None

    accuracy = rounds["eval_accuracy"].dropna()
    return {
        "num_rounds": float(len(rounds)),
        "eval_accuracy": last("eval_accuracy"),
        "best_accuracy": float(accuracy.max()) if len(accuracy) else None,
        "eval_loss": last("eval_loss"),
        "train_loss": last("train_loss"),
        "sim_seconds": last("sim_seconds"),
        **{name: float(rounds[name].sum()) for name in SUMS},
        "oom_fraction": float(rounds["num_oom"].sum()) / turns if turns else None,
    }


def rounds_from_the_start(run: RunDirectory) -> pd.DataFrame:
    """A run's rounds, from 1, with ``uplink_total`` and ``energy_total`` since its start.

    A first row, round 0, is the untrained model, if it was evaluated.
    """
    import pandas as pd

    frame = run.rounds()
    frame = frame.assign(
        uplink_total=frame["uplink_bytes"].cumsum(),
        energy_total=frame["energy_joules"].cumsum(),
    )
    baseline = run.meta.get("baseline")
    if not baseline or frame.empty:
        return frame
    zeros = {"sim_seconds": 0.0, "uplink_total": 0.0, "energy_total": 0.0}
    first = pd.DataFrame([{"round": UNTRAINED, "stage": frame["stage"].iloc[0], **zeros, **baseline}])
    return pd.concat([first.reindex(columns=frame.columns).astype(frame.dtypes, errors="ignore"), frame])


def device_costs(run: RunDirectory) -> pd.DataFrame:
    """Costs per device class (index ``device``), means over the turns that ran.

    Fractions of all turns: ``oom_fraction`` (refused for memory), ``refused_fraction`` (for another budget),
    ``dropped_fraction``, ``late_fraction`` and ``failed_fraction``. ``peak_memory_bytes`` is the largest need,
    refused turns included, beside ``budget_bytes``.
    """
    clients = run.clients()
    clients = clients.assign(device=clients["device"].fillna("-"))
    everyone = clients.groupby("device", sort=True)
    ran = clients[~clients["status"].isin(("oom", "refused"))].groupby("device", sort=True)
    costs = ran[list(names(CLIENT_COLUMNS, "sum", "mean"))].mean().reindex(list(everyone.groups))
    costs.insert(0, "num_turns", everyone.size())
    costs["peak_memory_bytes"] = everyone["peak_memory_bytes"].max()
    costs["budget_bytes"] = everyone["budget_bytes"].min()
    for status in STATUSES:
        costs[f"{status}_fraction"] = (clients["status"] == status).groupby(clients["device"]).mean()
    return costs


def paid(costs: pd.DataFrame) -> tuple[Column, ...]:
    """The costs of a turn that any device class has: a server's half costs something in split learning alone."""
    return tuple(column for column in TURN_COSTS if (costs[column.name].fillna(0) != 0).any())
