"""What a run needs to go on is on disk, whole, whenever it is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from fleetune.engine.checkpoint import Checkpoint, Progress
from fleetune.methods.base import State
from fleetune.tensors import Packed, pack

STATE = State({"layers.0.x.lora_A": torch.arange(6.0).view(2, 3)}, {"stage": 1, "groups": [[0, 2], [1]]})


def kept(value: float) -> Packed:
    return pack({"layers.0.x.lora_B": torch.full((2,), value)})


def values_of(checkpoint: Checkpoint) -> dict[int, float]:
    """Client -> the number it kept."""
    return {c: float(t["layers.0.x.lora_B"][0]) for c, _, t in checkpoint.all_private(np.arange(10))}


def test_there_is_nothing_before_the_first_round(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, num_clients=3)
    assert checkpoint.load() is None
    assert checkpoint.private([0, 1, 2]) == {}
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
    checkpoint.keep(0, {1: kept(0.1), 2: kept(0.2)})
    checkpoint.keep(1, {2: kept(1.2), 5: kept(1.5)})
    checkpoint.save(checkpoint.snapshot(STATE, Progress(2)))
    reopened = Checkpoint(tmp_path, num_clients=6)
    reopened.load()
    for one in (checkpoint, reopened):
        assert values_of(one) == pytest.approx({1: 0.1, 2: 1.2, 5: 1.5})
        assert [c for c, _, _ in one.all_private(np.arange(10))] == [1, 2, 5]
        assert [n for _, n, _ in one.all_private(10 * np.arange(6))] == [10, 20, 50]
        assert set(one.private([0, 2, 5])) == {2, 5}
        torch.testing.assert_close(one.private([2])[2].unpack()["layers.0.x.lora_B"], torch.full((2,), 1.2))


def test_files_that_no_client_needs_are_deleted(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, num_clients=3)
    for round_idx in range(3):
        checkpoint.keep(round_idx, {0: kept(round_idx), round_idx: kept(round_idx)})
        checkpoint.save(checkpoint.snapshot(STATE, Progress(round_idx + 1)))
    assert sorted(p.name for p in checkpoint.clients.iterdir()) == [
        "round_000001.safetensors",
        "round_000002.safetensors",
    ]
    assert values_of(checkpoint) == {0: 2.0, 1: 1.0, 2: 2.0}


def test_a_round_that_waits_is_saved_as_it_was(tmp_path: Path):
    """Round 0 is saved when round 1 has changed client 0's tensors already: a run that goes on finds those of round 0."""
    checkpoint = Checkpoint(tmp_path, num_clients=2)
    snapshots = []
    progress = Progress()
    for round_idx in range(2):
        checkpoint.keep(round_idx, {0: kept(round_idx)})
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
    assert [p.name for p in checkpoint.clients.iterdir()] == ["round_000001.safetensors"]


def test_a_kill_between_private_tensors_and_state_goes_back_to_the_last_whole_round(tmp_path: Path):
    """Round 1's private file is written, its state is not: all clients still have what they had after round 0."""
    checkpoint = Checkpoint(tmp_path, num_clients=2)
    checkpoint.keep(0, {0: kept(0.0), 1: kept(0.5)})
    checkpoint.save(checkpoint.snapshot(STATE, Progress(1)))
    checkpoint.keep(1, {0: kept(9.0), 1: kept(9.5)})  # and here it is killed
    resumed = Checkpoint(tmp_path, num_clients=2)
    found = resumed.load()
    assert found is not None
    assert found[1].next_round == 1
    assert values_of(resumed) == {0: 0.0, 1: 0.5}
    resumed.keep(1, {0: kept(1.0)})  # the round is done again
    resumed.save(resumed.snapshot(STATE, Progress(2)))
    assert values_of(resumed) == {0: 1.0, 1: 0.5}


def test_a_state_that_cannot_be_written_leaves_the_last_one(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, num_clients=1)
    checkpoint.save(checkpoint.snapshot(STATE, Progress(1)))
    with pytest.raises(TypeError):
        checkpoint.save(checkpoint.snapshot(State(STATE.tensors, {"stage": object()}), Progress(2)))
    found = Checkpoint(tmp_path, num_clients=1).load()
    assert found is not None
    assert found[1].next_round == 1
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["state.safetensors"]
