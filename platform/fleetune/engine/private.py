"""What clients keep for themselves, in files beside the checkpoint: whoever carries out their work reads and writes them there.

A file holds the clients of one lot, each a row of bytes, so that a client is one read whatever the number of its tensors. The
coordinator knows of each client only the *place* of its newest row: the round and the lot. A host on a machine that does not
have the run's folder gets the rows along with its lot, and sends the new ones back (`Lot.private`, `LotReply.private`).
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fleetune.tensors import Packed, load_header, save

MAX_LOTS = 64
"""Lots of a round at most: a place is round * MAX_LOTS + lot."""


def place_of(round_idx: int, lot: int) -> int:
    """Where a round's lot lies."""
    return round_idx * MAX_LOTS + lot


@dataclass(frozen=True)
class PrivateStore:
    """The folder of one run. A value: it travels with lots."""

    folder: str
    token: str
    """What its file ``token`` says, so that a folder of this name on another machine is not taken for it."""

    @classmethod
    def open(cls, folder: Path) -> PrivateStore:
        """The store in a folder, made where there is none."""
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / "token"
        if not token.exists():
            token.write_text(uuid.uuid4().hex)
        return cls(str(folder.resolve()), token.read_text())

    @property
    def is_here(self) -> bool:
        """Whether this machine has the folder."""
        try:
            return (Path(self.folder) / "token").read_text() == self.token
        except OSError:
            return False

    def write(self, place: int, private: Mapping[int, Packed]) -> None:
        """Write a lot's clients, at once: the file is there whole or not at all."""
        forms: dict[tuple, list[int]] = {}
        for client, packed in private.items():
            forms.setdefault(packed.layout, []).append(client)
        tensors = {}
        for n, clients in enumerate(forms.values()):
            tensors[f"{n}/clients"] = torch.tensor(clients)
            tensors[f"{n}/rows"] = torch.from_numpy(np.stack([private[client].data for client in clients]))
        save(self._file(place), tensors, {"layouts": list(forms)})

    def read(self, places: Mapping[int, int]) -> Iterator[tuple[int, Packed]]:
        """(client, what it kept) for clients at their places, ascending by place and client."""
        by_place = sorted((place, client) for client, place in places.items())
        for place, clients in itertools.groupby(by_place, key=lambda pair: pair[0]):
            yield from self._read_file(place, [client for _, client in clients])

    def _read_file(self, place: int, wanted: Iterable[int]) -> Iterator[tuple[int, Packed]]:
        from safetensors import safe_open

        with safe_open(self._file(place), framework="np") as file:
            row_of = {}
            for n, layout in enumerate(load_header(file)["layouts"]):
                form = tuple((name, dtype, tuple(shape)) for name, dtype, shape in layout)
                rows = file.get_slice(f"{n}/rows")
                for i, client in enumerate(file.get_tensor(f"{n}/clients").tolist()):
                    row_of[client] = (form, rows, i)
            for client in wanted:
                form, rows, i = row_of[client]
                yield client, Packed(form, rows[i])

    def forget(self, needed: Iterable[int], *, before_round: int) -> None:
        """Delete the files of rounds that were saved, those before ``before_round``, which hold no place that is needed."""
        names = {self._file(place).name for place in needed}
        first_kept = self._file(place_of(before_round, 0)).name
        for path in Path(self.folder).glob("round_*.safetensors"):
            if path.name < first_kept and path.name not in names:
                path.unlink(missing_ok=True)

    def _file(self, place: int) -> Path:
        round_idx, lot = divmod(place, MAX_LOTS)
        return Path(self.folder) / f"round_{round_idx:06d}_lot_{lot:02d}.safetensors"
