"""The virtual-time timeline of a run in Chrome's trace event format: opens in Perfetto (ui.perfetto.dev) and
chrome://tracing. One microsecond in the trace is one microsecond of virtual time.

A process for the server, with a lane for rounds, one for stages and one for what it does, and counters of what was
spent so far; then a process per device class with a lane per client. A client's slices in a round follow each other
without a gap from the round's start to its end: waiting (where clients work in turn), downlink, compute, server (split
learning: it waits for the server's half), uplink, idle; one slice where these overlap (pipelined); or refused all
along. A late client's are cut at the round's close. So the slices of a lane never overlap, and those of one turn add up
to the round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune.records.run_directory import RunDirectory
from fleetune.records.stored_files import plain

if TYPE_CHECKING:
    import pandas as pd

# Perfetto stays fluent up to about a hundred thousand events (assumed); beyond this, clients are sampled evenly.
MAX_EVENTS = 50_000
PHASES = ("downlink", "compute", "uplink")
EVENTS_PER_TURN = len(PHASES) + 1
REFUSED = ("oom", "refused")
SERVER = 1
ROUNDS, STAGES, WORK = range(3)  # the server's lanes
Event = dict[str, Any]


def write_timeline(run_dir: str | Path | RunDirectory, *, max_events: int = MAX_EVENTS) -> Path:
    """Writes ``trace.json`` into the run directory and returns its path."""
    run = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory.open(run_dir)
    rounds, clients = run.rounds(), run.clients()
    sample, sampled = sample_clients(clients, max_events=max_events)
    names = [*_server_names(), *_client_names(sample)]
    events = [*_round_events(rounds), *_stage_events(rounds), *_server_events(rounds, clients), *_turns(sample, rounds)]
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    notes = {"run_id": run.run_id, "clock": "virtual time", "clients": sampled}
    head = f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(notes)}, "traceEvents": ['
    lines = ",\n".join(json.dumps(event, default=plain) for event in [*names, *events])
    run.write("trace.json", "\n".join([head, lines, "]}", ""]).encode())
    return run.path / "trace.json"


def round_starts(rounds: pd.DataFrame) -> dict[int, float]:
    """Round -> virtual time at which it began: when the one before it ended, or the first client came after that."""
    ends = rounds["sim_seconds"].ffill().fillna(0.0).to_numpy(dtype=float)
    waited = rounds["waited_seconds"].fillna(0.0).to_numpy(dtype=float) if "waited_seconds" in rounds else 0.0
    return dict(zip(rounds["round"].tolist(), (np.r_[0.0, ends][: len(ends)] + waited).tolist(), strict=True))


def round_ends(rounds: pd.DataFrame) -> dict[int, float]:
    """Round -> virtual time of its close."""
    ends = rounds["sim_seconds"].ffill().fillna(0.0)
    return dict(zip(rounds["round"].tolist(), ends.tolist(), strict=True))


def sample_clients(clients: pd.DataFrame, *, max_events: int) -> tuple[pd.DataFrame, str]:
    """The rows of evenly chosen clients, about ``max_events`` events in all, and a note that says how many clients these are."""
    ids = np.sort(clients["client_id"].dropna().unique())
    num_events = EVENTS_PER_TURN * len(clients)
    if num_events <= max_events:
        return clients, f"all {len(ids)}"
    num_kept = max(1, int(len(ids) * max_events / num_events))
    chosen = ids[np.linspace(0, len(ids) - 1, num_kept).astype(int)]
    return clients[clients["client_id"].isin(chosen)], f"{num_kept} of {len(ids)}, evenly chosen by id"


# -- the server -----------------------------------------------------------------------------------------------------------
def _round_events(rounds: pd.DataFrame) -> Iterator[Event]:
    """A slice per round with its row as arguments, and counters of what all clients have spent by its end."""
    starts, ends = round_starts(rounds), round_ends(rounds)
    shown = [c for c in rounds.columns if c not in ("run_id", "round", "sim_seconds")]
    spent = {
        "uplink MB": ("uplink_bytes", 1e-6),
        "downlink MB": ("downlink_bytes", 1e-6),
        "kJ": ("energy_joules", 1e-3),
    }
    totals = {name: rounds[column].fillna(0.0).cumsum() * scale for name, (column, scale) in spent.items()}
    for i, row in enumerate(rounds.to_dict("records")):
        start, end = starts[row["round"]], ends[row["round"]]
        yield {
            **_slice(f"round {row['round']}", start, end, SERVER, ROUNDS),
            "args": _present({name: row[name] for name in shown}),
        }
        for name, total in totals.items():
            yield {"name": name, "ph": "C", "ts": end * 1e6, "pid": SERVER, "args": {"total": round(total.iloc[i], 6)}}


def _stage_events(rounds: pd.DataFrame) -> Iterator[Event]:
    """A slice per stage, over all of its rounds."""
    starts, ends = round_starts(rounds), round_ends(rounds)
    for stage, rows in rounds.dropna(subset="stage").groupby("stage"):
        first, last = rows["round"].iloc[0], rows["round"].iloc[-1]
        depth = f", {rows['depth'].iloc[0]:.0f} blocks" if "depth" in rows else ""
        yield _slice(f"stage {stage:.0f}{depth}", starts[first], ends[last], SERVER, STAGES)


def _server_events(rounds: pd.DataFrame, clients: pd.DataFrame) -> Iterator[Event]:
    """What the server does: it waits for somebody to come, works on its half of a split model, and aggregates."""
    starts, ends = round_starts(rounds), round_ends(rounds)
    waited = dict(zip(rounds["round"], rounds["waited_seconds"].fillna(0.0), strict=True))
    served = clients["server_seconds"].fillna(0.0)
    # Where clients work in turn, its half is at work until the last one's turn.
    until = (served + _waiting(clients)).where(served > 0, 0.0)
    half = clients.assign(until=until, served=served).groupby("round").agg({"until": "max", "served": "sum"})
    first = clients[clients["downlink_seconds"] > 0].groupby("round")["downlink_seconds"].min()
    for round_idx, start in starts.items():
        if waited[round_idx] > 0:
            yield _slice("nobody available", start - waited[round_idx], start, SERVER, WORK)
        longest = half["until"].get(round_idx, 0.0)
        if longest > 0:
            begin = start + first.get(round_idx, 0.0)
            args = {"seconds of all clients": half["served"][round_idx]}
            yield {**_slice("its half", begin, min(begin + longest, ends[round_idx]), SERVER, WORK), "args": args}
        yield {"name": "aggregate", "ph": "i", "s": "t", "ts": ends[round_idx] * 1e6, "pid": SERVER, "tid": WORK}


def _server_names() -> Iterator[Event]:
    yield _name("process_name", SERVER, 0, "server")
    for lane, name in ((ROUNDS, "rounds"), (STAGES, "stages"), (WORK, "server")):
        yield _name("thread_name", SERVER, lane, name)


# -- clients --------------------------------------------------------------------------------------------------------------
def _client_names(clients: pd.DataFrame) -> Iterator[Event]:
    pids = _pids(clients)
    for device, pid in pids.items():
        yield _name("process_name", pid, 0, device)
    pairs = clients[["device", "client_id"]].drop_duplicates()
    for device, client_id in zip(pairs["device"].fillna("-"), pairs["client_id"], strict=True):
        yield _name("thread_name", pids[device], int(client_id), f"client {int(client_id)}")


def _turns(clients: pd.DataFrame, rounds: pd.DataFrame) -> Iterator[Event]:
    """The slices of every client and round, a column at a time."""
    columns = {name: clients[name].tolist() for name in ("client_id", "round", "refused_by", "refused_hint")}
    pid = clients["device"].fillna("-").map(_pids(clients)).tolist()
    status = clients["status"].fillna("ok")
    end = clients["round"].map(round_ends(rounds)).to_numpy(dtype=float)
    at = clients["round"].map(round_starts(rounds)).to_numpy(dtype=float)

    def events(name: str, start: np.ndarray, stop: np.ndarray) -> Iterator[Event]:
        for i in np.flatnonzero(stop > start).tolist():
            event = _slice(name, float(start[i]), float(stop[i]), pid[i], columns["client_id"][i])
            yield {**event, "args": {"round": columns["round"][i], "status": status.iloc[i]}}

    refused = status.isin(REFUSED).to_numpy()
    for i in np.flatnonzero(refused).tolist():
        event = _slice("refused", float(at[i]), float(end[i]), pid[i], columns["client_id"][i])
        args = {"round": columns["round"][i], "by": columns["refused_by"][i], "would fit": columns["refused_hint"][i]}
        yield {**event, "args": _present(args)}
    for name, seconds in _spans(clients).items():
        stop = np.minimum(at + np.where(refused, 0.0, seconds), end)
        yield from events(name, at, stop)
        at = np.maximum(at, stop)
    yield from events("idle", np.where(refused, end, at), end)


def _spans(clients: pd.DataFrame) -> dict[str, np.ndarray]:
    """Phase -> seconds (n,) of each of n turns, in order of time. The server's phase is the rest of the turn."""
    spans = {phase: np.nan_to_num(clients[f"{phase}_seconds"].to_numpy(dtype=float)) for phase in PHASES}
    turn = np.nan_to_num(clients["sim_seconds"].to_numpy(dtype=float))
    server = np.nan_to_num(clients["server_seconds"].to_numpy(dtype=float))
    together = sum(spans.values()) + server
    overlaps = together > turn * (1 + 1e-9)
    spans = {phase: np.where(overlaps, 0.0, seconds) for phase, seconds in spans.items()}
    rest = np.where((server > 0) & ~overlaps, turn - sum(spans.values()), 0.0)
    return {
        "waiting": _waiting(clients),
        "downlink": spans["downlink"],
        "compute": spans["compute"],
        "server": rest,
        "uplink": spans["uplink"],
        "pipelined": np.where(overlaps, turn, 0.0),
    }


def _waiting(clients: pd.DataFrame) -> np.ndarray:
    """Seconds from the round's start to each of n turns, (n,); 0 for runs that were recorded without them."""
    if "waiting_seconds" not in clients:
        return np.zeros(len(clients))
    return np.nan_to_num(clients["waiting_seconds"].to_numpy(dtype=float))


def _pids(clients: pd.DataFrame) -> dict[Any, int]:
    """Device class -> process number, after the server's."""
    return {device: SERVER + 1 + i for i, device in enumerate(sorted(clients["device"].fillna("-").unique()))}


# -- events ---------------------------------------------------------------------------------------------------------------
def _slice(name: str, start: float, end: float, pid: int, tid: int) -> Event:
    """A complete event from ``start`` to ``end``, virtual seconds."""
    return {"name": name, "ph": "X", "ts": start * 1e6, "dur": max(end - start, 0.0) * 1e6, "pid": pid, "tid": tid}


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _present(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not null: NaN is no JSON."""
    return {name: value for name, value in args.items() if value is not None and value == value}
