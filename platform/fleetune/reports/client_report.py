"""The client profile in a run's report: what turns cost, who bounds the rounds, memory by part, who was refused and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.reports.client_stats import adapted, refusals
from fleetune.reports.figures import clients as figures
from fleetune.reports.html import image, percent, section, table, text
from fleetune.reports.run_stats import readable

if TYPE_CHECKING:
    import pandas as pd

WORDS = {"memory": "memory", "seconds": "time", "joules": "energy", "bytes": "bytes on its link"}


def profile_sections(clients: pd.DataFrame, folder: Path) -> list[str]:
    """The sections of the profile; their figures go to ``folder``."""
    clients = clients.assign(device=clients["device"].fillna("-"))
    out = [section("Distribution over turns", image(figures.distributions(clients, path=folder / "turns.png")))]
    if clients["status"].isin(("ok", "dropped")).any():
        out += [section("Who bounds the rounds", image(figures.bounding(clients, path=folder / "bounding.png")))]
    out += [section("Memory by part", image(figures.memory(clients, path=folder / "memory.png")))]
    out += [section("Energy", _energy(clients)), section("Refused", _refused(clients))]
    shares = adapted(clients)
    if shares.groupby("device").size().max() > 1:
        out += [section("What clients worked with", _shares(shares))]
    return out


def _energy(clients: pd.DataFrame) -> str:
    total = clients["energy_joules"].sum()
    lines = []
    for device, mine in clients.groupby("device"):
        spent, per_client = mine["energy_joules"], mine.groupby("client_id")["energy_joules"].sum()
        cells = [readable(spent.sum(), "joules"), percent(spent.sum() / total if total else None)]
        cells += [readable(per_client.mean(), "joules"), readable(per_client.max(), "joules")]
        computed = mine.loc[mine["flops"] > 0]
        per_flop = computed["energy_joules"].sum() / computed["flops"].sum() * 1e12 if len(computed) else float("nan")
        cells += [readable(per_flop, "joules")]
        lines.append(_row(str(device), cells))
    header = ["device class", "all clients", "share", "mean client", "most of a client", "per TFLOP"]
    return table(header, lines)


def _refused(clients: pd.DataFrame) -> str:
    rows = refusals(clients)
    if rows.empty:
        return "<p>Nobody: every turn kept to its budgets.</p>"
    lines = []
    for row in rows.to_dict("records"):
        cells = [f"{row['num_turns']}", percent(row["share"]), f"{row['num_clients']}"]
        cells += [readable(row["need_bytes"], "memory"), readable(row["budget_bytes"], "memory")]
        first = f"<td>{text(row['device'])}</td><td>{text(WORDS[row['refused_by']])}</td><td>{text(row['hint'])}</td>"
        lines.append(first + "".join(f"<td class='n'>{text(cell)}</td>" for cell in cells))
    header = ["device class", "for", "what would fit", "turns", "share", "clients", "needs at least", "budget"]
    return table(header, lines, num_text_columns=3)


def _shares(shares: pd.DataFrame) -> str:
    lines = []
    for row in shares.to_dict("records"):
        cells = [f"{row['batch_size']}", f"{row['rank']}", f"{row['depth']}", "yes" if row["checkpointing"] else "no"]
        lines.append(_row(row["device"], [*cells, f"{row['num_turns']}"]))
    return table(["device class", "batch size", "rank", "blocks", "checkpointing", "turns"], lines)


def _row(first: str, cells: list[str]) -> str:
    return f"<td>{text(first)}</td>" + "".join(f"<td class='n'>{text(cell)}</td>" for cell in cells)
