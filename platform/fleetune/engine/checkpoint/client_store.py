"""The client store: clients' private tensors in files beside the checkpoint, read and written by whoever carries out their work.

A file holds the clients of one unit, each a row of bytes, so that a client is one read whatever the number of its tensors. The
coordinator knows of each client only the *slot* of its newest row: the round and the unit. A worker on a machine that does not
have the run's folder gets the rows along with its unit, and sends the new ones back (`WorkUnit.private`).
"""

from __future__ import annotations

import functools
import itertools
import platform
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fleetune import files
from fleetune.columns import round_number
from fleetune.tensors import Packed, load_header, save

MAX_UNITS = 64
"""Work units of a round at most: a slot is round * MAX_UNITS + unit."""


def slot_of(round_idx: int, unit: int) -> int:
    """The number of a round's unit among all that a run can have. It names a file; no other round has it."""
    return round_idx * MAX_UNITS + unit


@dataclass(frozen=True)
class ClientStore:
    """The folder of one run. A value: it travels with units."""

    folder: str
    token: str
    """The text of its file ``token``, so that a folder of this name on another machine is not taken for it."""
    kernel: str = ""
    """The kernel under which the coordinator runs: its fsync writes out what processes under the same kernel have written."""

    @classmethod
    def open(cls, folder: Path) -> ClientStore:
        """The store in a folder, which is made if there is none."""
        folder.mkdir(parents=True, exist_ok=True)
        token = _token(folder)
        if token is None:  # a new one is as good as one that was damaged
            token = uuid.uuid4().hex
            files.write(folder / "token", token.encode())
        return cls(str(folder.resolve()), token, _kernel())

    @property
    def is_here(self) -> bool:
        """True if this process reaches the folder."""
        return _token(Path(self.folder)) == self.token

    def write(self, slot: int, private: Mapping[int, Packed]) -> None:
        """Write a unit's clients, in one step: the file is complete or not there at all.

        The coordinator makes it last before it writes a state that points to it (`sync`). Its fsync does nothing for what
        another machine has still to send to a shared folder, so there the worker waits for its own.
        """
        # Clients of different layouts (other blocks, say) have rows of different lengths: one array for each layout.
        clients_of: dict[tuple, list[int]] = {}
        for client, packed in private.items():
            clients_of.setdefault(packed.layout, []).append(client)
        tensors, checksums = {}, []
        for n, (layout, clients) in enumerate(clients_of.items()):
            tensors[f"{n}/clients"] = torch.tensor(clients)  # (k,) int
            tensors[f"{n}/rows"] = torch.from_numpy(
                np.stack([private[client].data for client in clients])
            )  # (k, bytes)
            checksums.append([_checksum(layout, client, private[client].data) for client in clients])
        metadata = {"layouts": list(clients_of), "checksums": checksums}
        save(self._file(slot), tensors, metadata, lasting=self.kernel != _kernel())

    def sync(self, slots: Iterable[int]) -> None:
        """Return once the files of these slots are on the disk."""
        files.sync(self._file(slot) for slot in slots)

    def check(self, slots: Iterable[int]) -> None:
        """Raises `files.Damaged` if a file of these slots is damaged or missing."""
        for slot in slots:
            path = self._file(slot)
            try:
                files.read(path, holds=_held(slot), must_be_sealed=True)
            except FileNotFoundError:
                raise files.damaged(path, "it is missing", holds=_held(slot)) from None

    def read(self, slots: Mapping[int, int]) -> Iterator[tuple[int, Packed]]:
        """(client, its private tensors) for each of ``slots`` (client -> slot), ascending by slot and client."""
        by_slot = sorted((slot, client) for client, slot in slots.items())
        for slot, clients in itertools.groupby(by_slot, key=lambda pair: pair[0]):
            yield from self._read_file(slot, [client for _, client in clients])

    def _read_file(self, slot: int, wanted: Iterable[int]) -> Iterator[tuple[int, Packed]]:
        """Each row has a checksum of its own, so that a client costs its own bytes and not those of all its unit."""
        from safetensors import safe_open

        path = self._file(slot)
        with files.parsing(path, holds=_held(slot)), safe_open(path, framework="np") as file:
            row_of, header = {}, load_header(file)
            for n, (listed, checksums) in enumerate(zip(header["layouts"], header["checksums"], strict=True)):
                layout = tuple((name, dtype, tuple(shape)) for name, dtype, shape in listed)  # JSON has lists only
                rows = file.get_slice(f"{n}/rows")  # nothing is read before it is indexed
                for i, client in enumerate(file.get_tensor(f"{n}/clients").tolist()):
                    row_of[client] = (layout, rows, i, checksums[i])
            # All are read before the first is yielded: what the caller raises meanwhile would be taken for damage of the file.
            read = []
            for client in wanted:
                layout, rows, i, expected = row_of[client]
                row = rows[i]
                if _checksum(layout, client, row) != expected:
                    raise files.damaged(path, f"the checksum of client {client} does not match", holds=_held(slot))
                read.append((client, Packed(layout, row)))
        yield from read

    def forget(self, needed: Iterable[int], *, before_round: int) -> None:
        """Delete the files of saved rounds, those before ``before_round``, whose slot is not among the needed ones.

        Later files stay: workers may have written them already, for a round that no state points to yet.
        """
        needed_names = {self._file(slot).name for slot in needed}
        first_unsaved = self._file(slot_of(before_round, 0)).name
        for path in Path(self.folder).glob("round_*.safetensors"):
            if path.name < first_unsaved and path.name not in needed_names:
                path.unlink(missing_ok=True)

    def _file(self, slot: int) -> Path:
        round_idx, unit = divmod(slot, MAX_UNITS)
        return Path(self.folder) / f"round_{round_idx:06d}_unit_{unit:02d}.safetensors"


def _token(folder: Path) -> str | None:
    """The token in a folder; None if there is none, or it is damaged."""
    try:
        text = (folder / "token").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) == 32 else None


@functools.cache
def _kernel() -> str:
    """Names the kernel under which this process runs. Processes with the same value share a page cache, in containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _checksum(layout: tuple, client: int, row: np.ndarray) -> int:
    """A row's checksum, over its layout and its client too: they say how and for whom it is read."""
    return files.checksum(repr((layout, client)).encode(), np.ascontiguousarray(row).data)


def _held(slot: int) -> str:
    return f"what clients keep since round {round_number(slot // MAX_UNITS)}"
