"""SplitFrozen: a client only sends, once of each example if the server keeps it."""

from __future__ import annotations

import numpy as np
import pytest

from fleetune.data.batches import NO_EXAMPLE, without
from fleetune.methods.split import SplitMethod
from fleetune.plan.walk import plan
from support import runs, tiny

SGD = {"evaluation.generate": False, "local.optimizer": "sgd", "local.learning_rate": 0.5}
CACHED = {"method.cache_activations": True}
HIDDEN = 32


def test_a_first_step_is_split_loras_with_a_frozen_client():
    """B = 0 in the client's blocks, so its half is the frozen one until it has taken a step of its own."""
    one_step = {**SGD, "rounds.num_rounds": 1, "local.steps": 1}
    frozen = runs.run(tiny.spec(one_step, method="split-frozen")).state.tensors
    split = runs.run(tiny.spec(one_step, method="split-lora"))
    method = split.problem.method
    assert isinstance(method, SplitMethod)
    runs.same_tensors(frozen, {n: t for n, t in split.state.tensors.items() if not method.on_client(n)})


def test_nothing_comes_down_and_the_client_computes_no_gradient():
    """Of SplitLoRA's FLOPs a client has the forward pass of its half, and of its memory neither gradients nor moments."""
    frozen = runs.run(tiny.spec({"evaluation.generate": False}, method="split-frozen")).clients
    split = runs.run(tiny.spec({"evaluation.generate": False}, method="split-lora")).clients
    for name in ("downlink_bytes", "downlink_seconds", "gradient_bytes", "optimizer_bytes", "adapter_bytes"):
        assert not frozen[name].any(), name
    assert (frozen["flops"] < 0.6 * split["flops"]).all()
    # The server spares the products that would lead back from its first block to the activations.
    assert (frozen["server_flops"] < split["server_flops"]).all()
    assert (frozen["server_flops"] > 0.9 * split["server_flops"]).all()
    assert (frozen["peak_memory_bytes"] < split["peak_memory_bytes"]).all()
    half = split["uplink_bytes"] - frozen["uplink_bytes"]
    assert half.nunique() == 1  # the adapter, which the client does not have


def test_overlapped_turns_wait_for_no_message_that_is_not_sent():
    """Pipelined: the slowest of client, server and uplink, whose first message alone is not overlapped. Nothing comes down."""
    job = {"evaluation.generate": False, "rounds.num_rounds": 1}
    done = runs.run(tiny.spec({**job, "method.pipelined": True}, method="split-frozen"))
    clients, fleet = done.clients, done.problem.fleet
    _, _, latency = fleet.draw_rates(done.problem.spec.seed, 0, clients["client_id"].to_numpy())
    parts = [clients["compute_seconds"], clients["server_seconds"], clients["uplink_seconds"] - latency]
    np.testing.assert_allclose(clients["sim_seconds"], latency + np.maximum.reduce(parts))


@pytest.mark.parametrize("passes", [1, 2])
def test_kept_activations_go_up_once(passes: int):
    """Three passes or more over two clients' examples, one a step: sum over examples of L (4 h + 4), whatever comes after."""
    job = {
        **SGD, "fleet.num_clients": 2, "rounds.clients_per_round": 2, "rounds.num_rounds": 3,
        "local.epochs": float(passes), "local.batch_size": 1, "data.num_examples": 12,
    }  # fmt: skip
    done = runs.run(tiny.spec({**job, **CACHED}, method="split-frozen"))
    anew = runs.run(tiny.spec(job, method="split-frozen"))
    lengths = done.problem.inputs.train.lengths
    once = int(lengths.sum()) * (4 * HIDDEN + 4)
    up = done.clients.groupby("round")["uplink_bytes"].sum().tolist()
    assert up == [once, 0, 0]
    assert anew.clients.groupby("round")["uplink_bytes"].sum().tolist() == [once * passes] * 3
    later = done.clients[done.clients["round"] > 1]
    for name in ("flops", "uplink_seconds", "compute_seconds"):
        assert not later[name].any(), name
    np.testing.assert_array_equal(done.clients["server_flops"], anew.clients["server_flops"])
    runs.same_tensors(done.state.tensors, anew.state.tensors)
    planned = plan(tiny.spec({**job, **CACHED}, method="split-frozen"))
    assert [row["uplink_bytes"] for row in planned.rounds] == up


def test_who_did_not_come_to_its_end_sends_again():
    """A client that leaves before it has sent everything is charged anew."""
    job = {
        **SGD, **CACHED, "fleet.num_clients": 2, "rounds.clients_per_round": 2, "rounds.num_rounds": 4,
        "local.epochs": 1.0, "fleet.dropout": 0.5,
    }  # fmt: skip
    clients = runs.run(tiny.spec(job, method="split-frozen")).clients
    for _, rows in clients.groupby("client_id"):
        statuses = rows["status"].tolist()
        assert "ok" in statuses
        first = statuses.index("ok")
        assert (rows["flops"].iloc[: first + 1] > 0).all()
        assert not rows["flops"].iloc[first + 1 :].any()


def test_what_is_known_is_left_out_of_batches():
    """Batches (0 1 2), (2 3 -), (1 2 4) without 1: (0 2 -), (3 - -), (4 - -); of (2 3 -) after that nothing is left."""
    rows = np.array([[0, 1, 2], [2, 3, NO_EXAMPLE], [1, 2, 4], [2, 3, NO_EXAMPLE]])
    want = [[0, 2, NO_EXAMPLE], [3, NO_EXAMPLE, NO_EXAMPLE], [4, NO_EXAMPLE, NO_EXAMPLE]]
    assert without(rows, np.array([1])).tolist() == want
    assert without(rows, np.arange(5)).shape == (0, 3)
