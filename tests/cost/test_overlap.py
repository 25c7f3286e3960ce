"""Split work in sequence or overlapped, and the server that does its half."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fleetune.cost.estimate import overlapped
from fleetune.errors import UserError
from fleetune.fleet.devices import device
from fleetune.records.timeline import write_timeline
from support import runs, tiny


def split(**overrides: Any) -> runs.Finished:
    return runs.run(tiny.spec({"evaluation.generate": False, **overrides}, method="split-lora"))


def test_overlapped_steps_take_as_long_as_the_slowest_part():
    """Adapter 1 s each way. Steps: 5 s of computing, 2 of the server, 3 down, 7 up: 17 in a row, 7 at once, and 2 around."""
    columns = {"compute": 5.0, "server": 2.0, "downlink": 1.0 + 3.0, "uplink": 1.0 + 7.0, "sim": 19.0}
    costs = {f"{name}_seconds": np.array([seconds]) for name, seconds in columns.items()}
    one = np.ones(1)
    out = overlapped(
        {**costs, "energy_joules": np.array([100.0])},
        adapter_down_seconds=one,
        adapter_up_seconds=one,
        idle_watts=3.0 * one,
    )
    assert out["sim_seconds"] == 9.0
    assert out["energy_joules"] == 100.0 - 3.0 * (19.0 - 9.0)
    assert out["uplink_seconds"] == 8.0


def test_pipelining_shortens_turns_and_changes_nothing_else():
    plain, piped = split(), split(**{"method.pipelined": True})
    runs.same_tensors(plain.state.tensors, piped.state.tensors)
    a, b = plain.clients, piped.clients
    parts = ["compute_seconds", "server_seconds", "downlink_seconds", "uplink_seconds"]
    np.testing.assert_allclose(a["sim_seconds"], a[parts].sum(axis=1))
    assert (b["sim_seconds"] < a["sim_seconds"]).all()
    assert (b["sim_seconds"] >= b[parts].max(axis=1)).all()
    idle = np.array([device(name).idle_watts for name in a["device"]])
    saved = a["energy_joules"] - b["energy_joules"]
    np.testing.assert_allclose(saved, idle * (a["sim_seconds"] - b["sim_seconds"]), rtol=1e-6)
    same = [*parts, "flops", "server_flops", "uplink_bytes", "downlink_bytes", "peak_memory_bytes", "train_loss"]
    assert (a[same] == b[same]).all(axis=None)
    slices = write_timeline(piped.run_dir).read_text().count('"pipelined"')
    assert slices == len(b)


def test_a_slower_server_takes_longer():
    fast, slow = split().clients, split(**{"fleet.server": "jetson-agx-orin-64gb"}).clients
    assert (slow["server_seconds"] > fast["server_seconds"]).all()
    assert (slow["compute_seconds"] == fast["compute_seconds"]).all()
    with pytest.raises(UserError, match="did you mean 'server-a100'") as raised:
        tiny.spec({"fleet.server": "server-a1000"})
    assert raised.value.field == "fleet.server"
