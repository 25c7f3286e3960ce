"""FedSA-LoRA: A is shared, B stays."""

from __future__ import annotations

import torch

from support import runs, tiny

FAST = {"evaluation.generate": False}
SQUARE = {**FAST, "model.lora.targets": ["q_proj", "o_proj"]}


def test_only_a_travels_and_that_is_half_for_square_layers():
    """q_proj and o_proj are 32 x 32, so A (2, 32) weighs what B (32, 2) does."""
    fedsa, passed = runs.recorded(tiny.spec(SQUARE, method="fedsa-lora"))
    fedit = runs.run(tiny.spec(SQUARE))
    assert all(name.endswith(".lora_A") for name in fedsa.state.tensors)
    for one in passed:
        assert one.partial_sum is not None
        assert all(name.endswith(".lora_A") for name in one.partial_sum.unpack())
        assert all(name.endswith(".lora_B") for kept in one.kept.values() for name in kept.unpack())
    assert (2 * fedsa.rounds["uplink_bytes"] == fedit.rounds["uplink_bytes"]).all()
    assert (2 * fedsa.rounds["downlink_bytes"] == fedit.rounds["downlink_bytes"]).all()


def test_one_client_is_fedit():
    """With nobody to average with, keeping B at home and sending it make no difference."""
    one = {**FAST, "fleet.num_clients": 1, "fleet.devices": {"jetson-nano": 1.0}, "rounds.clients_per_round": 1}
    fedsa = runs.run(tiny.spec(one, method="fedsa-lora"))
    fedit = runs.run(tiny.spec(one))
    runs.same_tensors(dict(sorted(fedsa.deployed.adapter.items())), dict(sorted(fedit.state.tensors.items())))


def test_the_model_that_is_shipped_takes_the_weighted_mean_of_b():
    """sum_k n_k B_k / sum_k n_k over the clients that took part, whichever rounds those were."""
    done = runs.run(tiny.spec(FAST, method="fedsa-lora"))
    sizes = done.clients.groupby("client_id")["shard_examples"].first()
    assert set(done.private) == set(sizes.index)
    name = "layers.2.mlp.up_proj.lora_B"
    mean = sum(sizes[c] * done.private[c][name] for c in done.private) / sizes.sum()
    torch.testing.assert_close(done.deployed.adapter[name], mean, rtol=1e-5, atol=1e-7)
    a_name = name.replace("lora_B", "lora_A")
    assert torch.equal(done.deployed.adapter[a_name], done.state.tensors[a_name])


def test_a_late_client_keeps_its_b_but_its_a_does_not_count():
    """Two of three replies are waited for: the third one's B is written down all the same."""
    done, passed = runs.recorded(
        tiny.spec({**FAST, "rounds.close": "first_k", "rounds.first_k": 2, "rounds.num_rounds": 1}, method="fedsa-lora")
    )
    assert sorted(done.clients["status"]) == ["late", "ok", "ok"]
    late = int(done.clients.loc[done.clients["status"] == "late", "client_id"].iloc[0])
    assert late in done.private
    weights = {int(c): float(w) for one in passed for c, w in zip(one.unit.client_ids, one.unit.weights, strict=True)}
    assert weights[late] == 0
    assert sum(weights.values()) == 1
