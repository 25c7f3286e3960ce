"""What a run needs to go on: server state, clock and totals in one file, clients' private tensors beside it (`PrivateStore`).

Those lie in the file of the last lot that a client was in; memory holds only which file that is. The state file is written
last and replaces the former in one step, so a run that is killed at any moment resumes from a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fleetune.engine.private import PrivateStore, place_of
from fleetune.errors import UserError
from fleetune.methods.base import State
from fleetune.tensors import Tensors, load, save


@dataclass
class Progress:
    """Where a run stands after its last finished round."""

    next_round: int = 0
    sim_seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run as it stood after a round, for as long as that round waits for its evaluation."""

    state: State
    progress: Progress
    places: np.ndarray
    provisioned: dict[int, str]


class Checkpoint:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, num_clients: int):
        self.folder = folder
        self.store = PrivateStore.open(folder / "clients")
        self.places = np.full(num_clients, -1, np.int32)
        """Where each client's private tensors lie in the store; -1: it has none."""
        self.provisioned: dict[int, str] = {}
        """Client -> key of the weights that it was sent last."""
        self._unwritten: list[Snapshot] = []

    @property
    def state_file(self) -> Path:
        """The file whose presence means that the run can go on."""
        return self.folder / "state.safetensors"

    def snapshot(self, state: State, progress: Progress) -> Snapshot:
        """The run as it stands now; `save` writes it, now or when later rounds have changed what is here."""
        copied = replace(progress, totals=dict(progress.totals))
        made = Snapshot(state, copied, self.places.copy(), dict(self.provisioned))
        self._unwritten.append(made)
        return made

    def save(self, snapshot: Snapshot) -> None:
        """Write all but private tensors, which were written before, and delete those that nobody needs any more."""
        meta = {"values": snapshot.state.values, "provisioned": snapshot.provisioned, **vars(snapshot.progress)}
        tensors = {f"state/{name}": tensor for name, tensor in snapshot.state.tensors.items()}
        save(self.state_file, {**tensors, "places": torch.from_numpy(snapshot.places)}, meta)
        self._unwritten.remove(snapshot)
        pointed = [one.places for one in (snapshot, *self._unwritten)]
        needed = [place for place in np.unique(np.concatenate(pointed)).tolist() if place >= 0]
        self.store.forget(needed, before_round=snapshot.progress.next_round)

    def load(self) -> tuple[State, Progress] | None:
        """State and progress of the last finished round; None where there is none yet. UserError where it is of old."""
        if not self.state_file.is_file():
            return None
        tensors, meta = load(self.state_file)
        if "places" not in tensors:
            raise UserError(
                "was written by an earlier version of fleetune",
                field="checkpoint",
                value=str(self.state_file),
                hint="go on with that version, or begin the run anew",
            )
        self.places = tensors.pop("places").numpy().copy()
        self.provisioned = {int(k): v for k, v in meta.pop("provisioned").items()}
        state = State({n.removeprefix("state/"): t for n, t in tensors.items()}, meta.pop("values"))
        return state, Progress(**meta)

    # -- clients' private tensors -----------------------------------------------------------------------------------------
    def kept(self, round_idx: int, lot: int, client_ids: np.ndarray) -> None:
        """These clients' newest tensors lie in a lot's file."""
        self.places[client_ids] = place_of(round_idx, lot)

    def places_of(self, client_ids: np.ndarray) -> dict[int, int]:
        """Client -> place, of those that have kept something."""
        found = client_ids[self.places[client_ids] >= 0]
        return dict(zip(found.tolist(), self.places[found].tolist(), strict=True))

    def all_private(self, num_examples: np.ndarray) -> Iterator[tuple[int, int, Tensors]]:
        """(client, its examples, its private tensors) of every client that took part, in the order in which they lie."""
        for client, packed in self.store.read(self.places_of(np.arange(len(self.places)))):
            yield client, int(num_examples[client]), packed.unpack()
