"""A plan in short: the needs of every stage on every class of device, and the run's totals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fleetune.columns import ROUND_COLUMNS
from fleetune.plan.walk import COUNTS, LARGEST, MEANS, SUMS, WORKLOAD, Plan, Row


def by_stage(plan: Plan) -> list[Row]:
    """One row per stage and device class, over all rounds of the stage; sums and seconds are per client that starts."""
    own = {row["round"]: row for row in plan.rounds}
    groups: dict[tuple[int, str], list[Row]] = {}
    for line in plan.devices:
        groups.setdefault((line["stage"], line["device"]), []).append(line)
    order = {name: i for i, name in enumerate(plan.spec.fleet.devices)}
    out = []
    for (stage, device), lines in sorted(groups.items(), key=lambda item: (item[0][0], order[item[0][1]])):
        row: Row = {"plan": plan.label, "stage": stage}
        row |= own_columns(own[lines[0]["round"]])
        row |= {"device": device, "num_rounds": len({line["round"] for line in lines})}
        row |= {name: sum(line[name] for line in lines) for name in COUNTS}
        row |= {name: max(line[name] for line in lines) for name in LARGEST}
        row["budget_bytes"] = lines[0]["budget_bytes"]
        row |= {f"least_{name}": min(line[f"least_{name}"] for line in lines) for name in WORKLOAD}
        row["checkpointing"] = any(line["checkpointing"] for line in lines)
        row |= {
            name: next((line[name] for line in lines if line[name]), None) for name in ("refused_by", "refused_hint")
        }
        started = [line["num_clients"] - line["num_oom"] - line["num_refused"] for line in lines]
        num = sum(started)
        row |= {name: sum(line[name] for line in lines) / num if num else None for name in SUMS}
        for name in MEANS:
            total = sum(n * line[name] for n, line in zip(started, lines, strict=True) if n)
            row[name] = total / num if num else None
        out.append(row)
    return out


def own_columns(row: Row) -> Row:
    """The method's own columns of a round (depth, split_point, …)."""
    common = {column.name for column in ROUND_COLUMNS}
    return {name: value for name, value in row.items() if name not in common}


def comparison(plans: Sequence[Plan]) -> list[Row]:
    """Totals of each plan, with how many times as much the first one needs: 2 means that this one halves it.

    A refused client costs nothing, so plans compare where they refuse the same clients.
    """
    first = plans[0].totals
    out = []
    for plan in plans:
        totals = plan.totals
        row: Row = {"plan": plan.label, **totals}
        for name in ("sim_seconds", "flops", "uplink_bytes", "downlink_bytes", "energy_joules"):
            row[f"{name}_ratio"] = first[name] / totals[name] if first[name] and totals[name] else None
        out.append(row)
    return out


def takes_part(plans: Sequence[Plan]) -> list[Row]:
    """Per plan and device class: the memory that each stage needs, in order, and the fraction of clients that it fits."""
    out = []
    for plan in plans:
        rows = by_stage(plan)
        for device in dict.fromkeys(row["device"] for row in rows):
            stages = [row for row in rows if row["device"] == device]
            out.append({
                "plan": plan.label,
                "device": device,
                "needs_bytes": [row["peak_memory_bytes"] for row in stages],
                "fits": [1 - (row["num_oom"] + row["num_refused"]) / row["num_clients"] for row in stages],
                "budget_bytes": stages[0]["budget_bytes"],
            })  # fmt: skip
    return out


def document(plans: Sequence[Plan]) -> dict[str, Any]:
    """The plans as ``--json`` prints them."""
    spec = plans[0].spec
    return {
        "job": spec.name,
        "model": spec.model.base,
        "costed": spec.cost.model or spec.model.base,
        "plans": [{"plan": plan.label, "totals": plan.totals, "stages": by_stage(plan)} for plan in plans],
        "comparison": comparison(plans),
        "assumptions": list(dict.fromkeys(note for plan in plans for note in plan.assumptions)),
    }
