"""The virtual-time timeline of a run in Chrome's trace event format: opens in Perfetto (ui.perfetto.dev) and
chrome://tracing.

A process per device class, a thread per client, and one process for the server. Within a round a client
receives, computes and sends one after the other, from the round's start or from its own ``start_seconds``
where the records have that column. One microsecond in the trace is one microsecond of virtual time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune.records.run_directory import RunDirectory

if TYPE_CHECKING:
    import pandas as pd

# Perfetto stays fluent up to about a hundred thousand events (assumed); beyond this, clients are sampled
# evenly.
MAX_EVENTS = 50_000
PHASES = ("downlink", "compute", "uplink")
SERVER = 1


def write_trace(run_dir: str | Path | RunDirectory, *, max_events: int = MAX_EVENTS) -> Path:
    """Writes ``trace.json`` into the run directory and returns its path."""
    run = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory.open(run_dir)
    rounds, clients = run.rounds(), run.clients()
    kept, sampled = sample_clients(clients, max_events=max_events)
    starts = round_starts(rounds)
    lines = [*_server_events(rounds, starts), *_names(kept), *_client_events(kept, starts)]
    notes = {"run_id": run.run_id, "clock": "virtual time", "clients": sampled}
    head = f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(notes)}, "traceEvents": ['
    text = "\n".join([head, ",\n".join(lines), "]}", ""])
    run.write("trace.json", text.encode())
    return run.path / "trace.json"


def round_starts(rounds: pd.DataFrame) -> dict[int, float]:
    """Round -> virtual time at which it began: when the one before it ended, or the first client came after that."""
    ends = rounds["sim_seconds"].ffill().fillna(0.0).to_numpy(dtype=float)
    waited = rounds["waited_seconds"].fillna(0.0).to_numpy(dtype=float)
    return dict(zip(rounds["round"].tolist(), (np.r_[0.0, ends][: len(ends)] + waited).tolist(), strict=True))


def sample_clients(clients: pd.DataFrame, *, max_events: int) -> tuple[pd.DataFrame, str]:
    """The rows of evenly chosen clients, so that about ``max_events`` events remain, and a note of how many
    these are.
    """
    ids = np.sort(clients["client_id"].dropna().unique())
    num_events = len(PHASES) * len(clients)
    if num_events <= max_events:
        return clients, f"all {len(ids)}"
    num_kept = max(1, int(len(ids) * max_events / num_events))
    chosen = ids[np.linspace(0, len(ids) - 1, num_kept).astype(int)]
    return clients[clients["client_id"].isin(chosen)], f"{num_kept} of {len(ids)}, evenly chosen by id"


def _server_events(rounds: pd.DataFrame, starts: dict[int, float]) -> Iterator[str]:
    yield _name_event("process_name", SERVER, 0, "server")
    shown = [c for c in rounds.columns if c not in ("run_id", "round", "sim_seconds")]
    for row in rounds.to_dict("records"):
        args = {name: row[name] for name in shown if row[name] is not None and row[name] == row[name]}
        start, end = starts[row["round"]], row["sim_seconds"]
        end = end if end == end else start
        slice_ = {"name": f"round {row['round']}", "ph": "X", "ts": start * 1e6, "dur": (end - start) * 1e6}
        yield json.dumps({**slice_, "pid": SERVER, "tid": 0, "args": args}, default=str)
        instant = {"name": "aggregate", "ph": "i", "s": "p", "ts": end * 1e6, "pid": SERVER, "tid": 0}
        yield json.dumps(instant)


def _names(clients: pd.DataFrame) -> Iterator[str]:
    pids = _pids(clients)
    for device, pid in pids.items():
        yield _name_event("process_name", pid, 0, device)
    pairs = clients[["device", "client_id"]].drop_duplicates()
    for device, client_id in zip(pairs["device"].fillna("-"), pairs["client_id"], strict=True):
        yield _name_event("thread_name", pids[device], int(client_id), f"client {int(client_id)}")


def _client_events(clients: pd.DataFrame, starts: dict[int, float]) -> Iterator[str]:
    """Three slices a row, or one instant for a client that did not run; a column at a time."""
    pids = _pids(clients)
    pid = clients["device"].fillna("-").map(pids).tolist()
    tid, round_idx = clients["client_id"].tolist(), clients["round"].tolist()
    status = clients["status"].fillna("ok").tolist()
    start = clients["round"].map(starts).to_numpy(dtype=float)
    if "start_seconds" in clients:
        own = clients["start_seconds"].to_numpy(dtype=float)
        start = np.where(np.isfinite(own), own, start)
    spans = [np.nan_to_num(clients[f"{phase}_seconds"].to_numpy(dtype=float)) for phase in PHASES]
    idle = sum(spans) == 0
    for i in np.flatnonzero(idle).tolist():
        place = f'"ts": {start[i] * 1e6:.3f}, "pid": {pid[i]}, "tid": {tid[i]}'
        yield f'{{"name": "{status[i]}", "ph": "i", "s": "t", {place}, "args": {{"round": {round_idx[i]}}}}}'
    for phase, seconds in zip(PHASES, spans, strict=True):
        ts, dur = (start * 1e6).tolist(), (seconds * 1e6).tolist()
        for i in np.flatnonzero(seconds > 0).tolist():
            place = f'"ts": {ts[i]:.3f}, "dur": {dur[i]:.3f}, "pid": {pid[i]}, "tid": {tid[i]}'
            args = f'"args": {{"round": {round_idx[i]}, "status": "{status[i]}"}}'
            yield f'{{"name": "{phase}", "ph": "X", {place}, {args}}}'
        start = start + seconds


def _pids(clients: pd.DataFrame) -> dict[Any, int]:
    """Device class -> process number, after the server's."""
    return {device: SERVER + 1 + i for i, device in enumerate(sorted(clients["device"].fillna("-").unique()))}


def _name_event(kind: str, pid: int, tid: int, name: str) -> str:
    return json.dumps({"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})
