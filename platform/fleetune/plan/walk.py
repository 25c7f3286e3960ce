"""Walks through a job's rounds without their work: the server's side on tensors without data, clients and prices as in a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune.columns import CLIENT_COLUMNS, ROUND_COLUMNS, names
from fleetune.engine.round.planner import RoundPlan, RoundPlanner
from fleetune.engine.round.rules import OK, OOM, REFUSED
from fleetune.engine.round.serving import serve
from fleetune.engine.rows import costed_columns, round_row
from fleetune.methods.base import Report, Update
from fleetune.models.network import linear_sites
from fleetune.models.outline import outline_base
from fleetune.plan.lengths import load_lengths, without_partition
from fleetune.plan.schedule import ExpectedRounds
from fleetune.problem import EvalSet, Inputs, Problem, build_problem
from fleetune.problem.input_checks import check_length
from fleetune.spec import RunSpec

# Client-rounds up to which every batch is drawn as in the run, so that the plan's numbers are the run's own. Drawing takes
# about 20 us each. For more client-rounds, lengths are taken by expectation.
MAX_DRAWN = 50_000
SUMS, MEANS, LARGEST = (names(CLIENT_COLUMNS, *kinds) for kinds in (("sum",), ("mean",), ("max", "part")))
# How turns end, num_ok and so on. Clients fail by what they compute, so none does in a plan.
ENDS = tuple(name for name in names(ROUND_COLUMNS, "sum") if name.startswith("num_") and name != "num_failed")
COUNTS = ("num_clients", *ENDS)
WORKLOAD = ("batch_size", "rank", "depth")  # what clients may make smaller

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The costs that a job would have."""

    label: str
    """The method, or the fields that were varied: what tells it from the plans beside it."""
    spec: RunSpec
    rounds: list[Row]
    """Rows as in rounds.parquet, without the columns that only training can fill."""
    devices: list[Row]
    """One row per round and device class: clients by status, sums over those that start, means of their seconds, the largest
    memory that any of them needs, the smallest workload, and of those refused the most frequent reason and hint."""
    assumptions: list[str]

    @property
    def totals(self) -> Row:
        """Sums over the whole run."""
        out: Row = {"num_rounds": len(self.rounds), "sim_seconds": self.rounds[-1]["sim_seconds"]}
        out |= {name: sum(row[name] for row in self.rounds) for name in COUNTS}
        return out | {name: sum(row[name] for row in self.devices) for name in SUMS}


def outline(spec: RunSpec, *, cache_dir: Path | None = None) -> tuple[Problem, list[str]]:
    """The job's problem on a base without weights and data without tokens, and the assumptions in words."""
    base = outline_base(spec.model)
    check_length(spec.data.max_tokens, base)
    lengths = load_lengths(spec, base, cache_dir=cache_dir)
    if lengths.assumed:
        spec = without_partition(spec)
    data = lengths.dataset().with_categories(lengths.keys)
    inputs = Inputs(
        base=base,
        sites=linear_sites(base, spec.model.lora),
        train=data,
        keys=lengths.keys,
        evaluation=EvalSet(data, []),
        dataset_name=spec.data.dataset,
    )
    return build_problem(spec, inputs), list(lengths.assumed)


def plan(spec: RunSpec, *, label: str | None = None, cache_dir: Path | None = None, hints: bool = True) -> Plan:
    """Walk through all rounds of a job. ``hints``: whether it says what would fit refused clients, which takes most of the time.

    Raises UserError, with the field, if the job cannot be planned.
    """
    problem, assumptions = outline(spec, cache_dir=cache_dir)
    assumptions += problem.fleet.rate_notes(spec.cost.precision)
    assumptions += [problem.method.plan_assumes] if problem.method.plan_assumes else []
    drawn = spec.rounds.num_rounds * spec.rounds.clients_per_round <= MAX_DRAWN
    if not drawn:
        assumptions.append(
            "so many batches are not drawn: their lengths are taken by expectation, the longest as the client's"
        )
        if problem.method.traits.caches:
            assumptions.append("what the server keeps of an example is priced as if it were sent each time")
    rounds: list[Row] = []
    devices: list[Row] = []
    if not hints:
        planner = (RoundPlanner if drawn else ExpectedRounds)(problem, hints="none")
    else:
        planner = RoundPlanner(problem) if drawn else ExpectedRounds(problem)
    for row, clients in walk(problem, planner):
        rounds.append(row)
        devices += by_device(problem, row, clients)
    if problem.method.traits.pooled:
        spec = problem.spec  # of the server alone, whose device the rows name
    return Plan(label or spec.method.name, spec, rounds, devices, assumptions)


def walk(problem: Problem, planner: RoundPlanner) -> Iterator[tuple[Row, dict[str, np.ndarray]]]:
    """Each round's row and its clients' columns (n,), as a run would record them, less what only training can fill."""
    method, sim_seconds = problem.method, 0.0
    provisioned: dict[int, str] = {}
    busy_until = np.zeros(problem.fleet.num_clients)
    with torch.device("meta"):
        state = method.start()
    for round_idx in itertools.count():
        if problem.spec.rounds.is_over(round_idx, sim_seconds):
            return
        with torch.device("meta"):
            state = method.begin_round(state, round_idx, Report(sim_seconds))
            state, server = serve(
                method, state, round_idx, carry_out=lambda work: {}, price=planner.pricing.server_work
            )
        now = planner.round(state, round_idx, provisioned, busy_until, sim_seconds=sim_seconds, server=server)
        sim_seconds = now.start_seconds + now.outcome.sim_seconds
        clients = costed_columns(problem, now)
        with torch.device("meta"):
            state_after = method.expected(state, expected_updates(now), round_idx)
        untrained = {**clients, "train_loss": np.full(len(now.client_ids), np.nan)}
        row = round_row(method.stage(round_idx), now, untrained, sim_seconds, serves=method.traits.serves)
        del row["train_loss"]
        yield {**row, **method.columns(state_after)}, clients
        state = state_after


def expected_updates(now: RoundPlan) -> list[Update]:
    """The updates of the clients that count, one for each payload, without tensors."""
    counts = now.outcome.status == OK
    ranks = now.work.of_clients("rank")
    out = []
    for key, group in enumerate(now.work.groups):
        members = np.flatnonzero(counts & (now.work.payload_of == key))
        if len(members):
            ids, total_weight = tuple(now.client_ids[members].tolist()), len(members) / int(counts.sum())
            out.append(
                Update({}, 1.0, ids, group=group, ranks=tuple(ranks[members].tolist()), total_weight=total_weight)
            )
    return out


def by_device(problem: Problem, row: Row, clients: dict[str, np.ndarray]) -> list[Row]:
    """A round's clients by the class of their device: `Plan.devices`."""
    out = []
    index = problem.fleet.device_index[clients["client_id"]]
    for kind in np.unique(index).tolist():
        of_kind = index == kind
        status = clients["status"][of_kind]
        started = of_kind.copy()
        started[of_kind] = (status != OOM) & (status != REFUSED)
        device = problem.fleet.devices[kind]
        line: Row = {
            "round": row["round"],
            "stage": row["stage"],
            "device": device.name,
            "num_clients": int(of_kind.sum()),
        }
        line |= {name: int((status == name.removeprefix("num_")).sum()) for name in ENDS}
        line |= {name: float(clients[name][of_kind].max()) for name in LARGEST}
        line |= {f"least_{name}": min(clients[name][of_kind].tolist()) for name in WORKLOAD}
        line["checkpointing"] = bool(np.any(clients["checkpointing"][of_kind]))
        line |= {name: _most_frequent(clients[name][of_kind]) for name in ("refused_by", "refused_hint")}
        line["budget_bytes"] = float(clients["budget_bytes"][of_kind].min())
        line |= {name: float(clients[name][started].sum()) for name in SUMS}
        line |= {name: float(clients[name][started].mean()) if started.any() else None for name in MEANS}
        out.append(line)
    return out


def _most_frequent(values: np.ndarray) -> str | None:
    """The most frequent word, the first of equally frequent ones; None if there is none."""
    words = [value for value in values.tolist() if value is not None]
    return max(dict.fromkeys(words), key=words.count) if words else None
