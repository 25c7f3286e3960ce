"""The checkpoint: server state, clock and totals in one file, clients' private tensors in others beside it (`ClientStore`).

A client's tensors lie in the file of the last unit that it was in; memory holds only which file that is. The state file is
written last, and the one of the round before stays until the new one is on the disk: a run that is killed at any moment, or
loses its power, goes on from a state that is intact. A checksum shows if one was damaged since; then the one before stands in.
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
    """Virtual time at which that round ended."""
    failed_rounds: int = 0
    """Rounds in a row up to the last in which everybody who worked diverged."""
    totals: dict[str, float] = field(default_factory=dict)
    """Column -> its sum over all rounds so far, in the column's unit."""
    baseline: dict[str, float] = field(default_factory=dict)
    """Quality of the untrained model."""
    quality: dict[str, float] = field(default_factory=dict)
    """Quality after the last round that was evaluated and recorded, for methods that go by it."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run as it stood after a round, for as long as that round waits for its evaluation."""

    state: State
    progress: Progress
    slots: np.ndarray
    """(clients,) int32, as in `Checkpoint`, and so are the next two."""
    busy_until: np.ndarray
    """(clients,) float, in virtual seconds."""
    provisioned: dict[int, str]


class Checkpoint:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, num_clients: int):
        self.folder = folder
        self.store = ClientStore.open(folder / "clients")
        self.slots = np.full(num_clients, -1, np.int32)
        """(clients,) int32: where each client's private tensors lie in the store; -1: it has none."""
        self.busy_until = np.zeros(num_clients)
        """(clients,) float: the virtual time in seconds at which each client's last turn ends."""
        self.provisioned: dict[int, str] = {}
        """Client -> key of the weights that it was sent last."""
        self.notes: list[str] = []
        """Lines for the user about how the run was read back."""
        self._unwritten: list[Snapshot] = []
        """Snapshots that were made and not yet handed to `saving`, oldest first."""
        self._written = np.full(num_clients, -1, np.int32)
        """(clients,) int32: the slots of the state that was written or read last."""
        self._lasting: set[int] = set()
        """Slots whose files are on the disk for certain."""

    @property
    def state_file(self) -> Path:
        """The state after the last round that was saved."""
        return self.folder / "state.safetensors"

    @property
    def former_file(self) -> Path:
        """The state after the round before that one."""
        return self.folder / "state_before.safetensors"

    def snapshot(self, state: State, progress: Progress) -> Snapshot:
        """The run as it stands now; `save` writes it, now or when later rounds have changed this object.

        Copies all that rounds change in place. The state is replaced and never changed, so it is not copied.
        """
        copied = replace(progress, totals=dict(progress.totals))
        snapshot = Snapshot(state, copied, self.slots.copy(), self.busy_until.copy(), dict(self.provisioned))
        self._unwritten.append(snapshot)
        return snapshot

    def save(self, snapshot: Snapshot) -> None:
        """Write all but private tensors, which were written before, and delete those that nobody needs any more."""
        self.saving(snapshot)()

    def saving(self, snapshot: Snapshot, *, after: Iterable[Path] = ()) -> Callable[[], None]:
        """Returns the work of `save`, to be carried out in another thread beside the next round.

        ``after``: files that must be on the disk before the state is. All that rounds change is read here, not in the work. The
        work of one call must be done before that of the next begins.
        """
        self._unwritten = [one for one in self._unwritten if one is not snapshot]
        # A file may go once nobody points to it: neither this state, nor the one before, which may have to stand in, nor a
        # snapshot that is still to be written.
        needed = _slots_in(snapshot.slots, self._written, *(one.slots for one in self._unwritten))
        # Only files that are new since the last state are synced, not those of all clients in every round.
        not_synced = [slot for slot in _slots_in(snapshot.slots) if slot not in self._lasting]
        # Counted as synced before they are: if the work fails, its error ends the run, and no later state is written.
        self._lasting = {*needed} & {*self._lasting, *not_synced}
        self._written = snapshot.slots

        def work() -> None:
            # The order is what makes a power cut harmless: what the state points to is on the disk before the state is, the
            # state is there before its name is, and what only the state before the last one needs goes when both names are.
            files.sync(after)
            self.store.sync(not_synced)
            files.write(self.state_file, _content(snapshot), lasting=True, former=self.former_file)
            self.store.forget(needed, before_round=snapshot.progress.next_round)

        return work

    def load(self, check: Callable[[int], None] | None = None) -> tuple[State, Progress] | None:
        """State and progress of the last saved round, or of the one before if that is damaged; None if there is neither.

        ``check``: called with the number of rounds that a state counts; raises `files.Damaged` if the records of so many are not
        intact. The state before counts one round less, so it may still do. If neither does, raises the damage that was found
        first; UserError if an earlier version of fleetune wrote the file.
        """
        damages: list[files.Damaged] = []
        for path in (self.state_file, self.former_file):
            try:
                saved = _read(path)
                if len(saved.slots) != len(self.slots):
                    raise files.damaged(path, f"it is of {len(saved.slots)} clients", holds="the run's state")
                self.store.check(_slots_in(saved.slots))
                if check is not None:
                    check(saved.progress.next_round)
            except FileNotFoundError:
                continue
            except files.Damaged as error:
                damages.append(error)
                continue
            if (
                path == self.former_file
            ):  # else the next save would make the damaged file the former one, and lose this one
                os.replace(path, self.state_file)
                self.notes += [f"{error}; going on from the round before" for error in damages[:1]]
            self.slots, self.busy_until, self.provisioned = saved.slots, saved.busy_until, saved.provisioned
            self._written, self._lasting = saved.slots.copy(), {*_slots_in(saved.slots)}
            return saved.state, saved.progress
        if damages:
            raise damages[0]
        return None

    # -- clients' private tensors -----------------------------------------------------------------------------------------
    def kept(self, round_idx: int, unit: int, client_ids: np.ndarray) -> None:
        """From now on these clients' private tensors are those in this unit's file; ``client_ids``: (k,) int."""
        self.slots[client_ids] = slot_of(round_idx, unit)

    def slots_of(self, client_ids: np.ndarray) -> dict[int, int]:
        """Client -> slot, for those of ``client_ids``, (k,) int, that have private tensors."""
        holders = client_ids[self.slots[client_ids] >= 0]
        return dict(zip(holders.tolist(), self.slots[holders].tolist(), strict=True))

    def all_private(self, num_examples: np.ndarray) -> Iterator[tuple[int, int, Tensors]]:
        """(client, number of its examples, its private tensors) of every client that has some, in the order of their slots.

        ``num_examples``: (clients,) int.
        """
        for client, packed in self.store.read(self.slots_of(np.arange(len(self.slots)))):
            yield client, int(num_examples[client]), packed.unpack()


def saved_rounds(folder: Path) -> int:
    """How many rounds the state in a checkpoint folder counts; 0 if there is none that can be read."""
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


def _slots_in(*arrays: np.ndarray) -> list[int]:
    """The slots that stand in these arrays, (clients,) each, every slot once and without the -1 of clients that have none."""
    return [slot for slot in np.unique(np.concatenate(arrays)).tolist() if slot >= 0]
