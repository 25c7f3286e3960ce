"""A round's records as columns: one entry per sampled client, and one row for the round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fleetune.columns import CLIENT_COLUMNS, names, round_number
from fleetune.data.batches import NO_EXAMPLE, num_tokens
from fleetune.engine.execution.work_units import WorkUnitReply
from fleetune.engine.round.planner import RoundPlan
from fleetune.engine.round.rules import DROPPED, FAILED, LATE, OK, OOM, REFUSED
from fleetune.problem import Problem

MEMORY = names(CLIENT_COLUMNS, "max", "part", "budget")
# What a turn spends, by the phase whose length it grows with. Energy grows with the whole turn.
SPENT = {column.name: column.phase for column in CLIENT_COLUMNS if column.phase}


def client_columns(problem: Problem, now: RoundPlan, replies: Sequence[WorkUnitReply]) -> dict[str, Any]:
    """Columns (n,) of clients.parquet: what the work costs, and what the workers measured."""
    return {**costed_columns(problem, now), **_measured(problem, now, replies)}


def costed_columns(problem: Problem, now: RoundPlan) -> dict[str, Any]:
    """The columns that need no training.

    A client spends nothing if it is refused or its turn would begin after the close, and if it leaves what it did until then.
    """
    fleet, costs, work, started = problem.fleet, now.costs, now.work, now.begins
    out: dict[str, Any] = {
        "client_id": now.client_ids,
        "device": np.array(fleet.device_names, dtype=object)[fleet.device_index[now.client_ids]],
        "status": now.outcome.status,
        "refused_by": now.refused_by,
        "refused_hint": now.hints,
        "failure": np.array(["diverged" if status == FAILED else None for status in now.outcome.status], object),
        "shard_examples": np.diff(problem.partition.offsets)[now.client_ids],
    }
    out.update({name: work.of_clients(name) for name in ("batch_size", "rank", "depth")})
    out["checkpointing"] = work.checkpointing
    out.update({name: costs[name] for name in MEMORY})
    busy = np.where(now.outcome.status == DROPPED, now.busy_seconds, costs["sim_seconds"])
    done = _fractions_done(costs, busy)
    out.update({name: np.where(started, done[phase] * costs[name], 0.0) for name, phase in SPENT.items()})
    out["sim_seconds"] = np.where(started, busy, 0.0)
    out["waiting_seconds"] = np.where(started, now.waiting_seconds, 0.0)
    return out


def _fractions_done(costs: dict[str, np.ndarray], busy_seconds: np.ndarray) -> dict[str, np.ndarray]:
    """The fraction of each phase, and of the full turn, that each client gets done in this time: (n,) each, 0 to 1."""
    down, turn, up = (costs[f"{phase}_seconds"] for phase in ("downlink", "sim", "uplink"))
    nothing = np.zeros(len(turn))
    spans = {
        "downlink": (nothing, down),
        "compute": (down, turn - up),
        "uplink": (turn - up, turn),
        "turn": (nothing, turn),
    }
    out = {}
    for phase, (start, end) in spans.items():
        part = (busy_seconds - start) / np.where(end > start, end - start, 1.0)
        out[phase] = np.where(busy_seconds >= end, 1.0, np.clip(part, 0.0, 1.0))
    return out


def _measured(problem: Problem, now: RoundPlan, replies: Sequence[WorkUnitReply]) -> dict[str, np.ndarray]:
    """The columns (n,) that workers measure: examples, tokens, loss, real time.

    Of several replies about a client (`engine.divergence`) the last one counts. The loss is null if it is not finite, if the
    client's work would have changed nothing and was not simulated, or if it looked at no example.
    """
    n, rows, started = len(now.client_ids), now.work.rows, now.begins
    loss, wall = np.full(n, np.nan), np.zeros(n)
    examples = np.array([int((r != NO_EXAMPLE).sum()) for r in rows], np.int64)
    tokens = np.array([int(num_tokens(problem.inputs.train, r).sum()) for r in rows], np.int64)
    for reply in replies:
        index = np.searchsorted(now.client_ids, reply.client_ids)
        loss[index], wall[index] = reply.losses, reply.wall_seconds
    return {
        "num_examples": np.where(started, examples, 0),
        "num_tokens": np.where(started, tokens, 0),
        "train_loss": np.where(np.isfinite(loss) & (tokens > 0), loss, np.nan),
        "wall_seconds": wall,
    }


def round_row(
    stage: int, now: RoundPlan, clients: dict[str, Any], sim_seconds: float, *, serves: bool = False
) -> dict[str, Any]:
    """The round's own row; evaluation, the method's columns and real time are added to it.

    ``serves``: whether the method's server may have work of its own (`Traits.serves`), whose costs are columns then.
    """
    outcome, ran = now.outcome, now.begins
    ok = outcome.status == OK
    weights = clients["shard_examples"][ok]
    loss = clients["train_loss"][ok]
    row = {
        "round": round_number(now.work.round_idx),
        "stage": stage,
        "num_available": now.num_available,
        "num_clients": len(ok),
        "num_ok": int(ok.sum()),
        "num_oom": outcome.count(OOM),
        "num_refused": outcome.count(REFUSED),
        "num_dropped": outcome.count(DROPPED),
        "num_late": outcome.count(LATE),
        "num_failed": outcome.count(FAILED),
        "train_loss": float((loss * weights).sum() / weights.sum()) if ok.any() else None,
        "sim_seconds": sim_seconds,
        "waited_seconds": now.waited_seconds,
        "uplink_bytes": float(clients["uplink_bytes"].sum()),
        "downlink_bytes": float(clients["downlink_bytes"].sum()),
        "energy_joules": float(clients["energy_joules"].sum()),
        "peak_memory_bytes_max": float(clients["peak_memory_bytes"][ran].max()) if ran.any() else None,
    }
    return {**row, **now.server.columns()} if serves else row
