"""The costs of a run's clients, as numbers for a report: who was refused and why, who bounds each round, memory by part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fleetune.columns import MEMORY_PARTS

if TYPE_CHECKING:
    import pandas as pd

REFUSED = ("oom", "refused")
PHASES = ("downlink", "compute", "server", "uplink")


def refusals(clients: pd.DataFrame) -> pd.DataFrame:
    """A row per device class and broken budget, most turns first.

    Columns: ``device, refused_by, num_turns, share`` (of the class's turns), ``num_clients, need_bytes`` (the least that a
    refused turn would have needed) and ``budget_bytes`` where memory was it, ``hint`` (what would fit most of them).
    """
    import pandas as pd

    columns = ["device", "refused_by", "num_turns", "share", "num_clients", "need_bytes", "budget_bytes", "hint"]
    refused = clients[clients["status"].isin(REFUSED)]
    turns = clients["device"].value_counts().to_dict()
    rows = []
    for (device, budget), refused_turns in refused.groupby(["device", "refused_by"]):
        is_memory = budget == "memory"
        rows.append(
            {
                "device": device,
                "refused_by": budget,
                "num_turns": len(refused_turns),
                "share": len(refused_turns) / turns[device],
                "num_clients": refused_turns["client_id"].nunique(),
                "need_bytes": refused_turns["peak_memory_bytes"].min() if is_memory else np.nan,
                "budget_bytes": refused_turns["budget_bytes"].iloc[0] if is_memory else np.nan,
                "hint": refused_turns["refused_hint"].value_counts().index[0],
            }
        )
    return pd.DataFrame(rows, columns=columns).sort_values("num_turns", ascending=False, kind="stable")


def refusal_lines(clients: pd.DataFrame) -> list[str]:
    """Refusals in words, a line per device class and budget."""
    return [
        f"{row['device']}: {row['num_turns']} turns ({row['share']:.0%}) for {row['refused_by']}; {fitting(row['hint'])}"
        for row in refusals(clients).to_dict("records")
    ]


def fitting(hint: str) -> str:
    """The hint of a refused client as a clause."""
    return "no smaller share fits" if hint == "nothing smaller" else f"would fit with {hint}"


def adapted(clients: pd.DataFrame) -> pd.DataFrame:
    """Turns by device class and what the client worked with: ``device, batch_size, rank, depth, checkpointing, num_turns``."""
    started = clients[~clients["status"].isin(REFUSED)]
    workload = ["device", "batch_size", "rank", "depth", "checkpointing"]
    return started.groupby(workload).size().rename("num_turns").reset_index()


def phase_seconds(clients: pd.DataFrame) -> pd.DataFrame:
    """The parts of each turn, columns :data:`PHASES`, which add up to it; where they overlap, in proportion."""
    out = clients[[f"{phase}_seconds" for phase in PHASES]].fillna(0.0).set_axis(list(PHASES), axis=1)
    together = out.sum(axis=1)
    scale = (clients["sim_seconds"] / together.where(together > 0, 1.0)).clip(upper=1.0)
    return out.mul(scale, axis=0)


def bounds(clients: pd.DataFrame) -> pd.DataFrame:
    """The client that each round waits for: the slowest of those that count, or that leave without a word.

    Index ``round``; columns ``client_id, device, sim_seconds``, the :data:`PHASES` of its turn, and ``longest``, the phase
    that takes most of it.
    """
    waited = clients[clients["status"].isin(("ok", "dropped"))]
    slowest = waited.loc[waited.groupby("round")["sim_seconds"].idxmax()]
    phases = phase_seconds(slowest)
    out = slowest[["round", "client_id", "device", "sim_seconds"]].join(phases)
    return out.assign(longest=phases.idxmax(axis=1)).set_index("round")


def own_models(clients: pd.DataFrame, personal: pd.DataFrame) -> pd.DataFrame:
    """The clients whose own model was evaluated last, and what each has paid until then, ascending by id.

    Columns: those of personal.parquet, ``num_turns``, ``energy_joules``, ``sim_seconds`` and ``link_bytes`` (both ways).
    """
    last = personal[personal["round"] == personal["round"].max()]
    before = clients[clients["round"] <= personal["round"].max()]
    before = before[~before["status"].isin(REFUSED)]
    before = before.assign(link_bytes=before["downlink_bytes"] + before["uplink_bytes"])
    turns = before.groupby("client_id")
    paid = turns[["energy_joules", "sim_seconds", "link_bytes"]].sum().assign(num_turns=turns.size())
    return last.merge(paid, left_on="client_id", right_index=True, how="left").sort_values("client_id")


def memory_parts(clients: pd.DataFrame) -> pd.DataFrame:
    """The turn of each device class that needs most memory, refused or not. Index ``device``; parts, need and budget in bytes."""
    most = clients.loc[clients.groupby("device")["peak_memory_bytes"].idxmax()].set_index("device")
    return most[[*MEMORY_PARTS, "peak_memory_bytes", "budget_bytes"]]
