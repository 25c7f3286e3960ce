"""A job's rounds without their work: the method's server side on tensors without data, clients and prices as in the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune.columns import CLIENT_COLUMNS, names
from fleetune.engine.round.planner import RoundPlanner
from fleetune.engine.round.rules import OOM, REFUSED
from fleetune.engine.rows import costed_columns, round_row
from fleetune.models.network import linear_sites
from fleetune.models.outline import outline_base
from fleetune.plan.lengths import load_lengths, without_partition
from fleetune.plan.schedule import ExpectedRounds
from fleetune.problem import EvalSet, Inputs, Problem, build_problem
from fleetune.problem.input_checks import check_length
from fleetune.spec import RunSpec

# Client-rounds up to which every batch is drawn as in the run, so that the plan's numbers are the run's own. Drawing takes
# about 20 us each; beyond, lengths are taken by expectation.
MAX_DRAWN = 50_000
SUMS, MEANS, LARGEST = (names(CLIENT_COLUMNS, *kinds) for kinds in (("sum",), ("mean",), ("max", "part")))

WORKLOAD = ("batch_size", "rank", "depth")  # what clients may make smaller

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a job would cost."""

    label: str
    """What sets it apart from the plans beside it: the method, or the fields that were varied."""
    spec: RunSpec
    rounds: list[Row]
    """As in rounds.parquet, without what only training shows."""
    devices: list[Row]
    """One row per round and device class: clients by status, sums over those that start, means of their seconds, the largest
    memory that any of them needs, the smallest workload, and of those refused the most frequent reason and hint."""
    assumptions: list[str]

    @property
    def totals(self) -> Row:
        """Of the whole run."""
        counted = ("num_clients", "num_ok", "num_oom", "num_refused", "num_dropped", "num_late")
        out: Row = {"num_rounds": len(self.rounds), "sim_seconds": self.rounds[-1]["sim_seconds"]}
        out |= {name: sum(row[name] for row in self.rounds) for name in counted}
        return out | {name: sum(row[name] for row in self.devices) for name in SUMS}


def outline(spec: RunSpec, *, cache_dir: Path | None = None) -> tuple[Problem, list[str]]:
    """The job's problem on a base without weights and data without tokens, and what was assumed."""
    base = outline_base(spec.model)
    check_length(spec.data.max_tokens, base)
    lengths = load_lengths(spec, base, cache_dir=cache_dir)
    if lengths.assumed:
        spec = without_partition(spec)
    data = lengths.dataset()
    inputs = Inputs(
        base=base,
        sites=linear_sites(base, spec.model.lora),
        train=data,
        keys=lengths.keys,
        evaluation=EvalSet(data, []),
        dataset_name=spec.data.dataset,
    )
    return build_problem(spec, inputs), list(lengths.assumed)


def plan(spec: RunSpec, *, label: str | None = None, cache_dir: Path | None = None) -> Plan:
    """Walk through all rounds of a job. UserError names the field where it cannot be planned."""
    problem, assumptions = outline(spec, cache_dir=cache_dir)
    assumptions += problem.fleet.rate_notes(spec.cost.precision)
    drawn = spec.rounds.num_rounds * spec.rounds.clients_per_round <= MAX_DRAWN
    if not drawn:
        assumptions.append(
            "so many batches are not drawn: their lengths are taken by expectation, the longest as the client's"
        )
    rounds: list[Row] = []
    devices: list[Row] = []
    for row, clients in walk(problem, RoundPlanner(problem) if drawn else ExpectedRounds(problem)):
        rounds.append(row)
        devices += by_device(problem, row, clients)
    return Plan(label or spec.method.name, spec, rounds, devices, assumptions)


def walk(problem: Problem, schedule: RoundPlanner) -> Iterator[tuple[Row, dict[str, np.ndarray]]]:
    """Each round's row and its clients' columns, as a run would record them, less what only training shows."""
    method, sim_seconds = problem.method, 0.0
    provisioned: dict[int, str] = {}
    busy_until = np.zeros(problem.fleet.num_clients)
    with torch.device("meta"):
        state = method.start()
    for round_idx in range(problem.spec.rounds.num_rounds):
        with torch.device("meta"):
            state = method.begin_round(state, round_idx)
        now = schedule.round(state, round_idx, provisioned, busy_until, sim_seconds=sim_seconds)
        sim_seconds = now.start_seconds + now.outcome.sim_seconds
        clients = costed_columns(problem, now)
        untrained = {**clients, "train_loss": np.full(len(now.client_ids), np.nan)}
        row = round_row(method.stage(round_idx), now, untrained, sim_seconds)
        del row["train_loss"]
        yield {**row, **method.columns(state)}, clients


def by_device(problem: Problem, row: Row, clients: dict[str, np.ndarray]) -> list[Row]:
    """A round's clients, added up by the class of their device."""
    out = []
    index = problem.fleet.device_index[clients["client_id"]]
    for kind in np.unique(index).tolist():
        mine = index == kind
        status = clients["status"][mine]
        started = mine.copy()
        started[mine] = (status != OOM) & (status != REFUSED)
        device = problem.fleet.devices[kind]
        line: Row = {
            "round": row["round"],
            "stage": row["stage"],
            "device": device.name,
            "num_clients": int(mine.sum()),
        }
        line |= {f"num_{name}": int((status == name).sum()) for name in ("ok", "oom", "refused", "dropped", "late")}
        line |= {name: float(clients[name][mine].max()) for name in LARGEST}
        line |= {f"least_{name}": min(clients[name][mine].tolist()) for name in WORKLOAD}
        line["checkpointing"] = bool(np.any(clients["checkpointing"][mine]))
        line |= {name: _most_frequent(clients[name][mine]) for name in ("refused_by", "refused_hint")}
        line["budget_bytes"] = float(clients["budget_bytes"][mine].min())
        line |= {name: float(clients[name][started].sum()) for name in SUMS}
        line |= {name: float(clients[name][started].mean()) if started.any() else None for name in MEANS}
        out.append(line)
    return out


def _most_frequent(values: np.ndarray) -> str | None:
    """The word that stands most often, the first of equals; None where there is none."""
    words = [value for value in values.tolist() if value is not None]
    return max(dict.fromkeys(words), key=words.count) if words else None
