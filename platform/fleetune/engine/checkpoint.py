"""What a run needs to go on: server state, clock and totals in one file per round, clients' private tensors beside it.

A client's private tensors lie in the file of the last round it took part in; memory holds only which file that is. The state
file is written last and replaces the former in one step, so a run that is killed at any moment resumes from a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

    @property
    def state_file(self) -> Path:
        """The file whose presence means that the run can go on."""
        return self.folder / "state.safetensors"

    def save(self, state: State, progress: Progress) -> None:
        """Write everything but private tensors, which `keep` has written before."""
        meta = {"values": state.values, "provisioned": self.provisioned, **vars(progress)}
        tensors = {f"state/{name}": tensor for name, tensor in state.tensors.items()}
        save(self.state_file, {**tensors, "last_round": torch.from_numpy(self.last_round)}, meta)

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
        """Write what clients keep after a round, and forget files that no client needs any more."""
        if not private:
            return
        tensors = {f"{c}/{name}": t for c, packed in private.items() for name, t in packed.unpack().items()}
        save(self._file(round_idx), tensors)
        self.last_round[list(private)] = round_idx

    def forget_unneeded(self) -> None:
        """Delete private files that the saved state does not point to."""
        needed = {self._file(int(r)).name for r in np.unique(self.last_round) if r >= 0}
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
