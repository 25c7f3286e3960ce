"""A trace file of availability: intervals of virtual time, by client or by device, checked row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

FIELD = "fleet.availability.path"
TIMES = ("start_seconds", "end_seconds")


@dataclass(frozen=True)
class AvailabilityTrace:
    """m intervals [start, end) in virtual seconds, ordered by client and start; no two of one client touch."""

    client_ids: np.ndarray  # (m,) int64
    start_seconds: np.ndarray  # (m,)
    end_seconds: np.ndarray  # (m,)


def read_trace(name: str, *, device_names: list[str], device_index: np.ndarray) -> AvailabilityTrace:
    """The intervals of every client. A row of a device counts for all of its clients. ``device_index (num_clients,)``.

    Raises UserError if the file is missing or lacks a column, and with the row if an interval runs backwards, names a client
    that the fleet does not have, or overlaps with another one of the same client.
    """
    frame = _read(name)
    owner = _owner_column(name, frame)
    times = {column: _numbers(name, frame, column) for column in TIMES}
    start, end = times["start_seconds"], times["end_seconds"]
    _first_wrong(name, frame, start < 0, "starts before the run, at", start)
    _first_wrong(name, frame, end <= start, "ends no later than it starts, at", end)
    if owner == "device":
        rows, clients = _clients_of_devices(name, frame, device_names, device_index)
    else:
        rows, clients = np.arange(len(frame)), _client_ids(name, frame, len(device_index))
    order = np.lexsort((start[rows], clients))
    rows, clients = rows[order], clients[order]
    start, end = start[rows], end[rows]
    same = clients[1:] == clients[:-1]
    overlapping = np.flatnonzero(same & (start[1:] < end[:-1]))
    if len(overlapping):
        first, second = sorted((rows[overlapping[0]], rows[overlapping[0] + 1]))
        raise _wrong(
            name,
            frame,
            int(second),
            f"overlaps with {_place(name, frame, int(first))} for client {clients[overlapping[0]]}",
        )
    joins = same & (start[1:] == end[:-1])  # one interval that the file gives in pieces
    begins, ends = np.r_[True, ~joins], np.r_[~joins, True]
    return AvailabilityTrace(clients[begins], start[begins], end[ends])


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    path = Path(name).expanduser()
    if not path.is_file():
        guess = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else None
        hint = f"did you mean {path.parent / guess}?" if guess else "give the path of a .csv or .parquet file"
        raise UserError("no such file", field=FIELD, value=name, hint=hint)
    if path.suffix not in (".csv", ".parquet"):
        raise UserError("not a known format", field=FIELD, value=name, hint="formats: .csv, .parquet")
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, skipinitialspace=True, skip_blank_lines=False).dropna(how="all")
        else:
            frame = pd.read_parquet(path).reset_index(drop=True)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"cannot be read: {' '.join(str(error).split())}", field=FIELD, value=name) from None
    missing = [column for column in TIMES if column not in frame]
    if missing:
        raise UserError(
            f"has no column {missing[0]}", field=FIELD, value=name, hint=f"it has {', '.join(map(str, frame.columns))}"
        )
    if frame.empty:
        raise UserError("holds no interval", field=FIELD, value=name)
    return frame


def _owner_column(name: str, frame: pd.DataFrame) -> str:
    found = [column for column in ("client_id", "device") if column in frame]
    if len(found) != 1:
        rule = "has both client_id and device" if found else "has no column client_id or device"
        raise UserError(
            rule, field=FIELD, value=name, hint="say of each interval whose it is, with one of the two columns"
        )
    return found[0]


def _numbers(name: str, frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column as finite floats."""
    import pandas as pd

    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float)
    _first_wrong(name, frame, ~np.isfinite(values), f"{column} is not a number:", frame[column].to_numpy())
    return values


def _client_ids(name: str, frame: pd.DataFrame, num_clients: int) -> np.ndarray:
    ids = _numbers(name, frame, "client_id")
    unknown = (ids != np.floor(ids)) | (ids < 0) | (ids >= num_clients)
    rule = f"no such client; the fleet's are 0 to {num_clients - 1}:"
    _first_wrong(name, frame, unknown, rule, frame["client_id"].to_numpy())
    return ids.astype(np.int64)


def _clients_of_devices(
    name: str, frame: pd.DataFrame, device_names: list[str], device_index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the file, client ids), (m,) each: every row once for each client of its device."""
    kinds = {device: np.flatnonzero(device_index == kind) for kind, device in enumerate(device_names)}
    devices = frame["device"].to_numpy(dtype=object)
    unknown = np.array([device not in kinds for device in devices])
    rule = f"no such device in the fleet; it has {', '.join(device_names)}:"
    _first_wrong(name, frame, unknown, rule, devices)
    clients = [kinds[device] for device in devices]
    return np.repeat(np.arange(len(frame)), [len(ids) for ids in clients]), np.concatenate(clients)


def _first_wrong(name: str, frame: pd.DataFrame, wrong: np.ndarray, rule: str, values: Any) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise _wrong(name, frame, row, f"{rule} {values[row]}")


def _wrong(name: str, frame: pd.DataFrame, row: int, rule: str) -> UserError:
    content = ", ".join(f"{column}={value}" for column, value in frame.iloc[row].items())
    return UserError(f"{_place(name, frame, row)}: {rule}", field=FIELD, value=name, hint=f"the row is {content}")


def _place(name: str, frame: pd.DataFrame, row: int) -> str:
    """The line of a CSV file (its header is line 1), or the row of a Parquet file, from 1."""
    place = int(frame.index[row])
    return f"line {place + 2}" if name.endswith(".csv") else f"row {place + 1}"
