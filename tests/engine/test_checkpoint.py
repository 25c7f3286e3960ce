"""What a run needs to go on is on disk, whole, whenever it is killed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetune import files
from fleetune.engine.checkpoint.checkpoint import Checkpoint, Progress
from fleetune.engine.checkpoint.client_store import ClientStore, slot_of
from fleetune.errors import UserError
from fleetune.methods.base import State
from fleetune.tensors import Packed, pack, save
from support import runs

STATE = State({"layers.0.x.lora_A": torch.arange(6.0).view(2, 3)}, {"stage": 1, "groups": [[0, 2], [1]]})


def kept(value: float) -> Packed:
    return pack({"layers.0.x.lora_B": torch.full((2,), value)})


def keep(checkpoint: Checkpoint, round_idx: int, private: dict[int, Packed]) -> None:
    """As the first unit of a round does."""
    checkpoint.store.write(slot_of(round_idx, 0), private)
    checkpoint.kept(round_idx, 0, np.array(list(private)))


def values_of(checkpoint: Checkpoint) -> dict[int, float]:
    """Client -> the number it kept."""
    return {c: float(t["layers.0.x.lora_B"][0]) for c, _, t in checkpoint.all_private(np.arange(10))}


def files_of(checkpoint: Checkpoint) -> list[str]:
    return sorted(path.name for path in Path(checkpoint.store.folder).glob("*.safetensors"))


def test_there_is_nothing_before_the_first_round(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, num_clients=3)
    assert checkpoint.load() is None
    assert checkpoint.slots_of(np.arange(3)) == {}
    assert values_of(checkpoint) == {}


def test_what_is_saved_is_loaded(tmp_path: Path):
    saved = Checkpoint(tmp_path, num_clients=3)
    saved.provisioned = {2: "stage-1"}
    progress = Progress(4, 12.5, {"uplink_bytes": 3.0}, {"eval_loss": 6.0})
    saved.save(saved.snapshot(STATE, progress))
    loaded = Checkpoint(tmp_path, num_clients=3)
    found = loaded.load()
    assert found is not None
    runs.same_tensors(found[0].tensors, STATE.tensors)
    assert found[0].values == STATE.values
    assert found[1] == progress
    assert loaded.provisioned == {2: "stage-1"}


def test_clients_keep_what_they_had_in_their_last_round(tmp_path: Path):
    """Clients 1 and 2 in round 0, clients 2 and 5 in round 1: 1 keeps its old tensors, 2 has new ones."""
    checkpoint = Checkpoint(tmp_path, num_clients=6)
    keep(checkpoint, 0, {1: kept(0.1), 2: kept(0.2)})
    keep(checkpoint, 1, {2: kept(1.2), 5: kept(1.5)})
    checkpoint.save(checkpoint.snapshot(STATE, Progress(2)))
    reopened = Checkpoint(tmp_path, num_clients=6)
    reopened.load()
    for one in (checkpoint, reopened):
        assert values_of(one) == pytest.approx({1: 0.1, 2: 1.2, 5: 1.5})
        assert [c for c, _, _ in one.all_private(np.arange(10))] == [1, 2, 5]
        assert [n for _, n, _ in one.all_private(10 * np.arange(6))] == [10, 20, 50]
        assert one.slots_of(np.array([0, 2, 5])) == {2: slot_of(1, 0), 5: slot_of(1, 0)}


def test_files_that_no_client_needs_are_deleted(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, num_clients=3)
    for round_idx in range(3):
        keep(checkpoint, round_idx, {0: kept(round_idx), round_idx: kept(round_idx)})
        checkpoint.save(checkpoint.snapshot(STATE, Progress(round_idx + 1)))
    assert files_of(checkpoint) == ["round_000001_unit_00.safetensors", "round_000002_unit_00.safetensors"]
    assert values_of(checkpoint) == {0: 2.0, 1: 1.0, 2: 2.0}


def test_a_round_that_waits_is_saved_as_it_was(tmp_path: Path):
    """Round 0 is saved when round 1 has changed client 0's tensors already: a run that goes on finds those of round 0."""
    checkpoint = Checkpoint(tmp_path, num_clients=2)
    snapshots = []
    progress = Progress()
    for round_idx in range(2):
        keep(checkpoint, round_idx, {0: kept(round_idx)})
        checkpoint.provisioned[0] = f"stage-{round_idx}"
        progress.next_round, progress.totals["uplink_bytes"] = round_idx + 1, float(round_idx)
        snapshots.append(checkpoint.snapshot(STATE, progress))
    for round_idx in range(2):
        checkpoint.save(snapshots[round_idx])
        resumed = Checkpoint(tmp_path, num_clients=2)
        found = resumed.load()
        assert found is not None
        assert (found[1].next_round, found[1].totals) == (round_idx + 1, {"uplink_bytes": float(round_idx)})
        assert values_of(resumed) == {0: float(round_idx)}
        assert resumed.provisioned == {0: f"stage-{round_idx}"}
    assert files_of(checkpoint) == ["round_000000_unit_00.safetensors", "round_000001_unit_00.safetensors"]


def test_the_files_of_a_round_that_is_under_way_stay(tmp_path: Path):
    """Workers write round 1's while round 0 goes on record."""
    checkpoint = Checkpoint(tmp_path, num_clients=2)
    keep(checkpoint, 0, {0: kept(0.0)})
    snapshot = checkpoint.snapshot(STATE, Progress(1))
    checkpoint.store.write(slot_of(1, 3), {1: kept(1.0)})
    checkpoint.save(snapshot)
    assert files_of(checkpoint) == ["round_000000_unit_00.safetensors", "round_000001_unit_03.safetensors"]


def test_clients_of_unlike_tensors_share_a_file(tmp_path: Path):
    """Each gets back its own names, types and shapes, bit for bit."""
    private = {
        4: {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)},
        1: {"b": torch.arange(6.0).view(2, 3)},
        7: {"b": torch.arange(3.0) + 1, "a": torch.zeros(2, 2, dtype=torch.bfloat16)},
    }
    store = ClientStore.open(tmp_path)
    store.write(5, {client: pack(tensors) for client, tensors in private.items()})
    found = dict(store.read(dict.fromkeys(private, 5)))
    assert list(found) == [1, 4, 7]
    for client, packed in found.items():
        assert list(packed.unpack()) == list(private[client])
        runs.same_tensors(packed.unpack(), private[client])


def test_a_folder_of_the_same_name_elsewhere_is_not_the_store(tmp_path: Path):
    store = ClientStore.open(tmp_path / "here")
    assert store.is_here
    assert ClientStore.open(tmp_path / "here") == store
    assert not replace(store, token="another run's").is_here
    assert not replace(store, folder=str(tmp_path / "there")).is_here


def test_a_kill_between_private_tensors_and_state_goes_back_to_the_last_whole_round(tmp_path: Path):
    """Round 1's private file is written, its state is not: all clients still have what they had after round 0."""
    checkpoint = Checkpoint(tmp_path, num_clients=2)
    keep(checkpoint, 0, {0: kept(0.0), 1: kept(0.5)})
    checkpoint.save(checkpoint.snapshot(STATE, Progress(1)))
    keep(checkpoint, 1, {0: kept(9.0), 1: kept(9.5)})  # and here it is killed
    resumed = Checkpoint(tmp_path, num_clients=2)
    found = resumed.load()
    assert found is not None
    assert found[1].next_round == 1
    assert values_of(resumed) == {0: 0.0, 1: 0.5}
    keep(resumed, 1, {0: kept(1.0)})  # the round is done again
    resumed.save(resumed.snapshot(STATE, Progress(2)))
    assert values_of(resumed) == {0: 1.0, 1: 0.5}


def test_a_checkpoint_of_another_form_is_refused(tmp_path: Path):
    save(tmp_path / "state.safetensors", {"last_round": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"state.safetensors': was written by an earlier version.*begin the run anew"):
        Checkpoint(tmp_path, num_clients=1).load()


def test_a_state_that_cannot_be_written_leaves_the_last_one(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, num_clients=1)
    checkpoint.save(checkpoint.snapshot(STATE, Progress(1)))
    with pytest.raises(TypeError):
        checkpoint.save(checkpoint.snapshot(State(STATE.tensors, {"stage": object()}), Progress(2)))
    found = Checkpoint(tmp_path, num_clients=1).load()
    assert found is not None
    assert found[1].next_round == 1
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["state.safetensors"]


def test_the_state_before_stays_until_the_next_one_and_so_does_what_it_points_to(tmp_path: Path):
    """After rounds 0, 1 and 2 the newest state is damaged: that after round 1 stands in, then round 2 is done again."""
    checkpoint = Checkpoint(tmp_path, num_clients=2)
    for round_idx in range(3):
        keep(checkpoint, round_idx, {round_idx % 2: kept(round_idx)})
        checkpoint.save(checkpoint.snapshot(STATE, Progress(round_idx + 1)))
    content = bytearray(checkpoint.state_file.read_bytes())
    content[-1] ^= 1
    checkpoint.state_file.write_bytes(content)
    resumed = Checkpoint(tmp_path, num_clients=2)
    found = resumed.load()
    assert found is not None
    assert found[1].next_round == 2
    assert values_of(resumed) == {0: 0.0, 1: 1.0}
    keep(resumed, 2, {0: kept(2)})
    resumed.save(resumed.snapshot(STATE, Progress(3)))
    again = Checkpoint(tmp_path, num_clients=2)
    assert (again.load() or (STATE, Progress()))[1].next_round == 3
    assert values_of(again) == {0: 2.0, 1: 1.0}


def test_what_a_state_points_to_is_on_the_disk_before_it_and_the_records_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    monkeypatch.delenv(files.SWITCH, raising=False)
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    checkpoint = Checkpoint(tmp_path / "c", num_clients=2)
    keep(checkpoint, 0, {0: kept(0.0)})
    part = tmp_path / "round_00000000.arrow"
    part.touch()
    snapshot = checkpoint.snapshot(STATE, Progress(1))
    seen.clear()
    checkpoint.saving(snapshot, after=[part])()
    assert seen[:4] == [part.name, tmp_path.name, "round_000000_unit_00.safetensors", "clients"]
    assert seen[4].startswith(".state.safetensors")
    assert seen[5:] == ["c"]


def test_a_row_that_was_damaged_while_the_run_goes_on_is_told(tmp_path: Path):
    store = ClientStore.open(tmp_path)
    store.write(5, {1: kept(0.25), 2: kept(0.5)})
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    slot = content.index(np.float32(0.5).tobytes())
    content[slot] ^= 1
    path.write_bytes(content)
    assert [client for client, _ in store.read({1: 5})] == [1]
    with pytest.raises(files.Damaged, match=r"what clients keep since round 1: the checksum of client 2"):
        list(store.read({2: 5}))
