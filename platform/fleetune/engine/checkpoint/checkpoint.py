"""What a run needs to go on: server state, clock and totals in one file, clients' private tensors beside it (`ClientStore`).

Those lie in the file of the last unit that a client was in; memory holds only which file that is. The state file is written
last, and the one of the round before is kept until that is on the disk, so a run that is killed at any moment, or loses its
power, resumes from a whole one. A state that was damaged since is found out by its checksum, and the one before stands in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fleetune import files
from fleetune.engine.checkpoint.client_store import ClientStore, slot_of
from fleetune.errors import UserError
from fleetune.methods.base import State
from fleetune.tensors import Tensors, load, to_bytes


@dataclass
class Progress:
    """Where a run stands after its last finished round."""

    next_round: int = 0
    """Index of the next round, from 0: how many rounds are finished."""
    sim_seconds: float = 0.0
    failed_rounds: int = 0
    """Rounds in a row up to the last in which everybody who worked diverged."""
    totals: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run as it stood after a round, for as long as that round waits for its evaluation."""

    state: State
    progress: Progress
    slots: np.ndarray
    busy_until: np.ndarray
    provisioned: dict[int, str]


class Checkpoint:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, num_clients: int):
        self.folder = folder
        self.store = ClientStore.open(folder / "clients")
        self.slots = np.full(num_clients, -1, np.int32)
        """Where each client's private tensors lie in the store; -1: it has none."""
        self.busy_until = np.zeros(num_clients)
        """The virtual time at which each client's last turn ends."""
        self.provisioned: dict[int, str] = {}
        """Client -> key of the weights that it was sent last."""
        self.notes: list[str] = []
        """What the user should know of how the run was read back."""
        self._unwritten: list[Snapshot] = []
        self._written = np.full(num_clients, -1, np.int32)
        """The slots of the state that was written or read last."""
        self._lasting: set[int] = set()
        """Places whose files are known to be on the disk."""

    @property
    def state_file(self) -> Path:
        """The state after the last round that was saved."""
        return self.folder / "state.safetensors"

    @property
    def former_file(self) -> Path:
        """The state after the round before that one."""
        return self.folder / "state_before.safetensors"

    def snapshot(self, state: State, progress: Progress) -> Snapshot:
        """The run as it stands now; `save` writes it, now or when later rounds have changed what is here."""
        copied = replace(progress, totals=dict(progress.totals))
        made = Snapshot(state, copied, self.slots.copy(), self.busy_until.copy(), dict(self.provisioned))
        self._unwritten.append(made)
        return made

    def save(self, snapshot: Snapshot) -> None:
        """Write all but private tensors, which were written before, and delete those that nobody needs any more."""
        self.saving(snapshot)()

    def saving(self, snapshot: Snapshot, *, after: Iterable[Path] = ()) -> Callable[[], None]:
        """What `save` does, to be carried out later, beside the next round. ``after``: files that must be on the disk before.

        All that rounds change is read here. A call must have been carried out before the next one is.
        """
        self._unwritten = [one for one in self._unwritten if one is not snapshot]
        kept = _places(snapshot.slots, self._written, *(one.slots for one in self._unwritten))
        unsure = [slot for slot in _places(snapshot.slots) if slot not in self._lasting]
        self._lasting = {*kept} & {*self._lasting, *unsure}
        self._written = snapshot.slots

        def work() -> None:
            # The order is what makes a power cut harmless: what the state points to is on the disk before the state is, the
            # state is there before its name is, and what only the state before the last one needs goes when both names are.
            files.sync(after)
            self.store.sync(unsure)
            files.write(self.state_file, _content(snapshot), lasting=True, former=self.former_file)
            self.store.forget(kept, before_round=snapshot.progress.next_round)

        return work

    def load(self, check: Callable[[int], None] | None = None) -> tuple[State, Progress] | None:
        """State and progress of the last saved round, or of the one before where that is damaged; None where there is neither.

        ``check``: raises `files.Damaged` where the records of so many rounds are not whole; with those of one round less, the
        state of the round before may still do. Raises the first damage that was found where neither does, and UserError where
        an earlier version of fleetune wrote it.
        """
        problems: list[files.Damaged] = []
        for path in (self.state_file, self.former_file):
            try:
                found = _read(path)
                if len(found.slots) != len(self.slots):
                    raise files.damaged(path, f"it is of {len(found.slots)} clients", holds="the run's state")
                self.store.check(_places(found.slots))
                if check is not None:
                    check(found.progress.next_round)
            except FileNotFoundError:
                continue
            except files.Damaged as error:
                problems.append(error)
                continue
            if path == self.former_file:  # otherwise the next save would put the damaged one in its slot
                os.replace(path, self.state_file)
                self.notes += [f"{error}; going on from the round before" for error in problems[:1]]
            self.slots, self.busy_until, self.provisioned = found.slots, found.busy_until, found.provisioned
            self._written, self._lasting = found.slots.copy(), {*_places(found.slots)}
            return found.state, found.progress
        if problems:
            raise problems[0]
        return None

    # -- clients' private tensors -----------------------------------------------------------------------------------------
    def kept(self, round_idx: int, unit: int, client_ids: np.ndarray) -> None:
        """These clients' newest tensors lie in a unit's file."""
        self.slots[client_ids] = slot_of(round_idx, unit)

    def slots_of(self, client_ids: np.ndarray) -> dict[int, int]:
        """Client -> slot, of those that have kept something."""
        found = client_ids[self.slots[client_ids] >= 0]
        return dict(zip(found.tolist(), self.slots[found].tolist(), strict=True))

    def all_private(self, num_examples: np.ndarray) -> Iterator[tuple[int, int, Tensors]]:
        """(client, its examples, its private tensors) of every client that took part, in the order in which they lie."""
        for client, packed in self.store.read(self.slots_of(np.arange(len(self.slots)))):
            yield client, int(num_examples[client]), packed.unpack()


def saved_rounds(folder: Path) -> int:
    """How many rounds the state in a checkpoint folder counts; 0 where there is none that can be read."""
    try:
        return _read(folder / "state.safetensors").progress.next_round
    except (OSError, UserError):
        return 0


def _content(snapshot: Snapshot) -> bytes:
    meta = {"values": snapshot.state.values, "provisioned": snapshot.provisioned, **vars(snapshot.progress)}
    tensors = {f"state/{name}": tensor for name, tensor in snapshot.state.tensors.items()}
    clients = {"slots": torch.from_numpy(snapshot.slots), "busy_until": torch.from_numpy(snapshot.busy_until)}
    return to_bytes({**tensors, **clients}, meta)


def _read(path: Path) -> Snapshot:
    """The run as it stands in a state file."""
    tensors, meta = load(path, holds="the run's state")
    if not {"slots", "busy_until"} <= tensors.keys():
        raise UserError(
            "was written by an earlier version of fleetune",
            field="checkpoint",
            value=str(path),
            hint="go on with that version, or begin the run anew",
        )
    slots, busy_until = (tensors.pop(name).numpy().copy() for name in ("slots", "busy_until"))
    provisioned = {int(k): v for k, v in meta.pop("provisioned").items()}
    state = State({n.removeprefix("state/"): t for n, t in tensors.items()}, meta.pop("values"))
    return Snapshot(state, Progress(**meta), slots, busy_until, provisioned)


def _places(*arrays: np.ndarray) -> list[int]:
    """The slots in arrays of them, each once."""
    return [slot for slot in np.unique(np.concatenate(arrays)).tolist() if slot >= 0]
