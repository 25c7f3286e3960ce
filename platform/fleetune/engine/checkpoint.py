"""What a run needs to go on: server state, clock and totals in one file per round, clients' private tensors beside it.

A client's private tensors lie in the file of the last round it took part in; memory holds only which file that is. The state
file is written last and replaces the former in one step, so a run that is killed at any moment resumes from a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune.methods.base import State
from fleetune.tensors import Packed, Tensors, load, pack, save, saved_names


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
    last_round: np.ndarray
    provisioned: dict[int, str]


class Checkpoint:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, num_clients: int):
        self.folder = folder
        self.clients = folder / "clients"
        self.clients.mkdir(parents=True, exist_ok=True)
        self.last_round = np.full(num_clients, -1, np.int32)
        """Round whose file holds the client's private tensors; -1: it has none."""
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
        made = Snapshot(state, copied, self.last_round.copy(), dict(self.provisioned))
        self._unwritten.append(made)
        return made

    def save(self, snapshot: Snapshot) -> None:
        """Write all but private tensors, which `keep` has written before, and delete those that nobody needs any more."""
        meta = {"values": snapshot.state.values, "provisioned": snapshot.provisioned, **vars(snapshot.progress)}
        tensors = {f"state/{name}": tensor for name, tensor in snapshot.state.tensors.items()}
        save(self.state_file, {**tensors, "last_round": torch.from_numpy(snapshot.last_round)}, meta)
        self._unwritten.remove(snapshot)
        self._forget_unneeded(snapshot)

    def load(self) -> tuple[State, Progress] | None:
        """State and progress of the last finished round; None where there is none yet."""
        if not self.state_file.is_file():
            return None
        tensors, meta = load(self.state_file)
        self.last_round = tensors.pop("last_round").numpy().copy()
        self.provisioned = {int(k): v for k, v in meta.pop("provisioned").items()}
        state = State({n.removeprefix("state/"): t for n, t in tensors.items()}, meta.pop("values"))
        return state, Progress(**meta)

    # -- clients' private tensors -----------------------------------------------------------------------------------------
    def keep(self, round_idx: int, private: Mapping[int, Packed]) -> None:
        """Write what clients keep after a round."""
        if not private:
            return
        tensors = {f"{c}/{name}": t for c, packed in private.items() for name, t in packed.unpack().items()}
        save(self._file(round_idx), tensors)
        self.last_round[list(private)] = round_idx

    def _forget_unneeded(self, written: Snapshot) -> None:
        """Delete private files that neither the saved state points to nor one that is still to be saved."""
        pointed = [np.unique(snapshot.last_round) for snapshot in (written, *self._unwritten)]
        needed = {self._file(int(r)).name for r in np.unique(np.concatenate(pointed)) if r >= 0}
        for path in self.clients.glob("*.safetensors"):
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def private(self, client_ids: Sequence[int] | np.ndarray) -> dict[int, Packed]:
        """The private tensors of these clients, of those that have any."""
        return {client: pack(tensors) for client, tensors in self._read(np.asarray(client_ids))}

    def all_private(self, num_examples: np.ndarray) -> Iterator[tuple[int, int, Tensors]]:
        """(client, its examples, its private tensors) of every client that took part, ascending."""
        for client, tensors in self._read(np.flatnonzero(self.last_round >= 0)):
            yield client, int(num_examples[client]), tensors

    def _read(self, client_ids: np.ndarray) -> Iterator[tuple[int, Tensors]]:
        from safetensors import safe_open

        files: dict[int, Any] = {}
        for client in client_ids.tolist():
            round_idx = int(self.last_round[client])
            if round_idx < 0:
                continue
            if round_idx not in files:
                file = safe_open(self._file(round_idx), framework="pt")
                names: dict[int, list[str]] = {}
                for key in saved_names(file):
                    names.setdefault(int(key.partition("/")[0]), []).append(key)
                files[round_idx] = (file, names)
            file, names = files[round_idx]
            yield client, {key.partition("/")[2]: file.get_tensor(key) for key in names[client]}

    def _file(self, round_idx: int) -> Path:
        return self.clients / f"round_{round_idx:06d}.safetensors"
