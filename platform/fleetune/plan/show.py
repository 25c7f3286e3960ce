"""Plans as tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fleetune.errors import printable
from fleetune.plan.summary import by_stage, comparison, own_columns, takes_part
from fleetune.plan.walk import Plan, Row
from fleetune.units import NOTHING, duration, energy, size

STAGES_IN_FULL = 3  # plans beside each other beyond which the stages are shown by need alone


def show(plans: Sequence[Plan]) -> None:
    """Stages by device class, the run's totals, and what was assumed; on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    spec = plans[0].spec
    costed = f", costed as {spec.cost.model}" if spec.cost.model else ""
    num_rounds = " or ".join(str(n) for n in dict.fromkeys(len(plan.rounds) for plan in plans))
    how = f"{num_rounds} rounds of {spec.rounds.clients_per_round} out of {spec.fleet.num_clients} clients"
    console.print(f"[bold]{escape(printable(spec.name))}[/]: {how}, {spec.model.base}{costed}; per client and round")
    if len(plans) <= STAGES_IN_FULL:
        for plan in plans:
            console.print(stage_table(plan, title=plan.label if len(plans) > 1 else None))
    else:
        console.print(fit_table(plans))
    console.print(total_table(plans))
    if len(plans) > 1:
        console.print(f"[dim]×n: {plans[0].label} needs n times as much[/]")
        if len({plan.totals["num_oom"] + plan.totals["num_refused"] for plan in plans}) > 1:
            console.print("[dim]refused clients cost nothing: totals with other clients refused do not compare[/]")
    for note in dict.fromkeys(note for plan in plans for note in plan.assumptions):
        console.print(f"[dim]assumed: {note}[/]", soft_wrap=True)


def stage_table(plan: Plan, *, title: str | None) -> Table:
    """The needs of every stage on every class of device."""
    rows = by_stage(plan)
    own = list(own_columns(plan.rounds[0]))
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in (
        "stage",
        *own,
        "device",
        "clients",
        "fit",
        "needs",
        "budget",
        "computing",
        "on the link",
        "energy",
        "up",
        "down",
    ):
        table.add_column(name, justify="left" if name == "device" else "right")
    hinted, adapts = any(row["refused_hint"] for row in rows), plan.spec.fleet.adapt
    if adapts != "none":
        table.add_column("works with")
    if hinted:
        table.add_column("would fit")
    previous = None
    for row in rows:
        new = row["stage"] != previous
        tail = [_smallest(row, adapts)] if adapts != "none" else []
        tail += [row["refused_hint"] or ""] if hinted else []
        lead = [str(row["stage"]), *(f"{row[name]:g}" for name in own)] if new else [""] * (1 + len(own))
        table.add_row(*lead, row["device"], *_cells(row), *tail)
        previous = row["stage"]
    return table


def _cells(row: Row) -> list[Text | str]:
    refused = row["num_oom"] + row["num_refused"]
    started = row["num_clients"] - refused
    fit = Text("all" if not refused else f"{started / row['num_clients']:.0%}" if started else "none")
    fit.stylize("green" if not refused else "yellow" if started else "red")
    cells: list[Text | str] = [str(row["num_clients"]), fit, size(row["peak_memory_bytes"]), size(row["budget_bytes"])]
    if not started:
        return [*cells, *[NOTHING] * 5]
    link = row["downlink_seconds"] + row["uplink_seconds"]
    return [
        *cells,
        duration(row["compute_seconds"]),
        duration(link),
        energy(row["energy_joules"]),
        size(row["uplink_bytes"]),
        size(row["downlink_bytes"]),
    ]


def _smallest(row: Row, adapts: str) -> str:
    """The smallest workload that any client of this row takes."""
    if adapts == "checkpointing":
        return "checkpointing" if row["checkpointing"] else "all kept"
    least = {"batch": "batch {least_batch_size}", "rank": "rank {least_rank}", "capacity": "{least_depth:g} blocks"}
    return least[adapts].format(**row)


def fit_table(plans: Sequence[Plan]) -> Table:
    """Plans by device class: the memory that each stage needs, and whether it fits."""
    rows = takes_part(plans)
    most = max(len(row["needs_bytes"]) for row in rows)
    table = Table(box=None, pad_edge=False)
    table.add_column("plan")
    table.add_column("device")
    table.add_column("budget", justify="right")
    for stage in range(most):
        table.add_column(f"stage {stage}" if most > 1 else "needs", justify="right")
    previous = None
    for row in rows:
        needs: list[Text | str] = []
        for need, fits in zip(row["needs_bytes"], row["fits"], strict=True):
            mark, style = ("✓", "green") if fits == 1 else ("✗", "red") if fits == 0 else (f"{fits:.0%}", "yellow")
            needs.append(Text(f"{size(need)} {mark}", style=style))
        table.add_row(row["plan"] if row["plan"] != previous else "", row["device"], size(row["budget_bytes"]), *needs)
        previous = row["plan"]
    return table


def total_table(plans: Sequence[Plan]) -> Table:
    """Each run's totals, and how many times as much the first one needs."""
    table = Table(box=None, pad_edge=False)
    table.add_column("plan")
    for name in ("refused", "virtual time", "energy", "up", "down", "FLOPs"):
        table.add_column(name, justify="right")
    for i, row in enumerate(comparison(plans)):

        def beside(text: str, name: str, row: Row = row, is_first: bool = i == 0) -> str:
            ratio = row[f"{name}_ratio"]
            return text if is_first or ratio is None else f"{text} (×{ratio:.3g})"

        table.add_row(
            row["plan"],
            f"{(row['num_oom'] + row['num_refused']) / row['num_clients']:.0%}",
            beside(duration(row["sim_seconds"]), "sim_seconds"),
            beside(energy(row["energy_joules"]), "energy_joules"),
            beside(size(row["uplink_bytes"]), "uplink_bytes"),
            beside(size(row["downlink_bytes"]), "downlink_bytes"),
            beside(f"{row['flops']:.3g}", "flops"),
        )
    return table
