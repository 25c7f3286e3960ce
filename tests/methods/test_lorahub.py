"""LoRAHub: composed pairs by hand, the authors' search across clients, and its history through a resumed run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fleetune.errors import RunFailed
from fleetune.methods.lorahub import _replayed, composed
from support import runs, tiny


def test_factors_are_added_up_by_hand():
    """w = (2, -1), ranks 1 and 2: A = 2 (1 2; 0 0) - (0 1; 1 0) = (2 3; -1 0), B = 2 (3 0) - (1 4) = (5 -4)."""
    pool = [
        {"q.lora_A": torch.tensor([[1.0, 2.0]]), "q.lora_B": torch.tensor([[3.0]])},
        {"q.lora_A": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "q.lora_B": torch.tensor([[1.0, 4.0]])},
    ]
    out = composed(pool, torch.tensor([2.0, -1.0]))
    assert out["q.lora_A"].tolist() == [[2.0, 3.0], [-1.0, 0.0]]
    assert out["q.lora_B"].tolist() == [[5.0, -4.0]]
    one_hot = composed(pool, torch.tensor([0.0, 1.0]))
    runs.same_tensors(one_hot, pool[1])
    assert not any(t.any() for t in composed(pool, torch.zeros(2)).values())


def settings(**more):
    return tiny.spec({"evaluation.generate": False, "rounds.num_rounds": 6, **more}, method="lorahub")


def test_a_federation_asks_and_tells_as_one_site_with_all_the_examples_would():
    """The search that minimises the clients' weighted mean loss with the penalty, called by itself, tries the same weights."""
    done = runs.run(settings())
    method = done.problem.method
    told = done.state.values["told"]
    values = {tuple(weights): value for weights, value in told}
    tried: list[list[float]] = []

    def value_of(weights: np.ndarray) -> float:
        tried.append(weights.tolist())
        return values[tuple(weights.tolist())]

    method._search().minimize(value_of)
    assert tried == [weights for weights, _ in told]
    assert len(told) == 6
    assert told[0][0] == [0.0, 0.0, 0.0]
    assert all(abs(w) <= 1.5 for weights, _ in told for w in weights)
    best = min(told, key=lambda pair: pair[1])
    assert done.state.values["best"] == best[1]
    assert done.state.tensors["weights"].tolist() == torch.tensor(best[0]).tolist()
    # At w = 0 nothing is added and nothing is penalised: the value is the base model's loss, and the best is no worse.
    assert np.isclose(
        told[0][1], np.average(done.clients["train_loss"][:3], weights=done.clients["shard_examples"][:3]), rtol=1e-5
    )
    assert best[1] <= told[0][1]


def test_scalars_go_up_weights_go_down_and_the_adapters_once():
    done = runs.run(settings(**{"method.candidates": 2}))
    clients = done.clients
    assert (clients["uplink_bytes"] == 4 * 2).all()
    later = clients[clients.duplicated("client_id")]
    assert (later["downlink_bytes"] == 4 * 2 * 3).all()
    assert (clients.drop(later.index)["downlink_bytes"] > 4 * 2 * 3).all()
    assert set(clients["client_id"]) == set(clients["client_id"][:3])  # fixed examples: the same clients in every round


def test_another_search_than_the_recorded_one_is_refused():
    done = runs.run(settings())
    told = [[[w + 0.1 for w in weights], value] for weights, value in done.state.values["told"]]
    with pytest.raises(RunFailed, match="asks otherwise than it did"):
        _replayed(done.problem.method._search(), told, 1)
