"""The client profile in a run's report: what turns cost, who bounds the rounds, memory by part, who was refused and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.records.personal_summary import summary
from fleetune.reports.client_stats import adapted, own_models, refusals
from fleetune.reports.figures import clients as figures
from fleetune.reports.figures.personal import quality_against_cost as figure_of_own
from fleetune.reports.html import Cell, Note, Part, Section, Table, image
from fleetune.units import percent, readable

if TYPE_CHECKING:
    import pandas as pd

BUDGET_NAMES = {"memory": "memory", "seconds": "time", "joules": "energy", "bytes": "bytes on its link"}


def profile_sections(clients: pd.DataFrame, folder: Path) -> list[Section]:
    """The sections of the profile, from the rows of clients.parquet; their figures go to ``folder``."""
    clients = clients.assign(device=clients["device"].fillna("-"))
    out = [Section("Distribution over turns", [image(figures.distributions(clients, path=folder / "turns.png"))])]
    if clients["status"].isin(("ok", "dropped")).any():
        out.append(Section("Who bounds the rounds", [image(figures.bounding(clients, path=folder / "bounding.png"))]))
    out.append(Section("Memory by part", [image(figures.memory(clients, path=folder / "memory.png"))]))
    out += [Section("Energy", [_energy(clients)]), Section("Refused", [_refused(clients)])]
    workloads = adapted(clients)
    if workloads.groupby("device").size().max() > 1:
        out.append(Section("What clients worked with", [_workloads(workloads)]))
    return out


MAX_LISTED = 10


def personal_sections(clients: pd.DataFrame, personal: pd.DataFrame, folder: Path) -> list[Section]:
    """The section on clients' own models, from the rows of clients.parquet and personal.parquet; none if none was evaluated."""
    if personal.empty:
        return []
    found = own_models(clients, personal)
    kinds = [kind for kind in ("eval_loss", "eval_accuracy") if found[kind].notna().any()]
    rows = []
    for number, of_round in personal.groupby("round"):
        cells = [Cell(f"{number}", number), Cell(f"{len(of_round)}", len(of_round))]
        for kind in kinds:
            values, high_is_bad = of_round[kind].to_numpy(dtype=float), kind == "eval_loss"
            cells += [_quality(kind, value) for value in summary("", values, high_is_bad=high_is_bad).values()]
        rows.append(cells)
    header = ["round", "clients", *(f"{kind.removeprefix('eval_')}{end}" for kind in kinds for end in QUALITY_ENDS)]
    return [
        Section(
            "Clients' own models",
            [
                Note("Each client's own model on the examples that the client holds out; every client counts alike."),
                Table(header, rows, caption="Clients' own models"),
                image(figure_of_own(found, path=folder / "own_models.png")),
                _paid_most(found, kinds[-1] if kinds else "eval_loss"),
            ],
        )
    ]


QUALITY_ENDS = (", mean", ", deviation", ", worst tenth")


def _quality(kind: str, value: float) -> Cell:
    return Cell(percent(value) if kind == "eval_accuracy" else f"{value:.3f}", value)


def _paid_most(found: pd.DataFrame, kind: str) -> Table:
    """The clients whose own model does worst, with what each has paid."""
    worst = found.sort_values(kind, ascending=kind == "eval_accuracy", kind="stable").head(MAX_LISTED)
    rows = []
    for row in worst.to_dict("records"):
        cells = [Cell(f"{row['client_id']}", row["client_id"]), Cell(str(row["device"])), _quality(kind, row[kind])]
        cells += [Cell(f"{row[name]:.0f}", row[name]) for name in ("num_turns", "shard_examples", "held_out_examples")]
        costs = (("energy_joules", "joules"), ("link_bytes", "bytes"), ("sim_seconds", "seconds"))
        rows.append([*cells, *(Cell(readable(row[name], unit), row[name]) for name, unit in costs)])
    header = ["client", "device class", kind.removeprefix("eval_"), "turns", "trains on", "holds out"]
    return Table([*header, "energy", "bytes, both ways", "virtual time"], rows, caption="Clients that do worst")


def _energy(clients: pd.DataFrame) -> Table:
    """Energy per device class: of all its clients, of one, and of a TFLOP."""
    total = clients["energy_joules"].sum()
    rows = []
    for device, of_device in clients.groupby("device"):
        spent, per_client = of_device["energy_joules"], of_device.groupby("client_id")["energy_joules"].sum()
        fraction = spent.sum() / total if total else None
        computed = of_device.loc[of_device["flops"] > 0]
        per_flop = computed["energy_joules"].sum() / computed["flops"].sum() * 1e12 if len(computed) else float("nan")
        cells = [
            Cell(str(device)),
            Cell(readable(spent.sum(), "joules"), spent.sum()),
            Cell(percent(fraction), fraction),
        ]
        cells += [Cell(readable(value, "joules"), value) for value in (per_client.mean(), per_client.max(), per_flop)]
        rows.append(cells)
    header = ["device class", "all clients", "fraction", "mean client", "most of a client", "per TFLOP"]
    return Table(header, rows, caption="Energy per device class")


def _refused(clients: pd.DataFrame) -> Part:
    """Why turns were refused, and what would have fitted."""
    found = refusals(clients)
    if found.empty:
        return Note("Nobody: every turn kept to its budgets.")
    rows = []
    for row in found.to_dict("records"):
        cells = [Cell(row["device"]), Cell(BUDGET_NAMES[row["refused_by"]]), Cell(str(row["hint"]))]
        cells += [Cell(f"{row['num_turns']}", row["num_turns"]), Cell(percent(row["share"]), row["share"])]
        cells += [Cell(f"{row['num_clients']}", row["num_clients"])]
        cells += [Cell(readable(row[name], "bytes"), row[name]) for name in ("need_bytes", "budget_bytes")]
        rows.append(cells)
    header = ["device class", "for", "what would fit", "turns", "fraction", "clients", "needs at least", "budget"]
    return Table(header, rows, caption="Refused turns")


def _workloads(workloads: pd.DataFrame) -> Table:
    """What clients that adapted worked with."""
    rows = []
    for row in workloads.to_dict("records"):
        numbers = [Cell(f"{row[name]}", row[name]) for name in ("batch_size", "rank", "depth")]
        again = Cell("yes" if row["checkpointing"] else "no")
        rows.append([Cell(row["device"]), *numbers, again, Cell(f"{row['num_turns']}", row["num_turns"])])
    header = ["device class", "batch size", "rank", "blocks", "checkpointing", "turns"]
    return Table(header, rows, caption="What clients worked with")
