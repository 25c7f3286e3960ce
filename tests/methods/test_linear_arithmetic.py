"""Linear arithmetic: the composed pairs by hand, and the adapters that it comes to in special cases."""

from __future__ import annotations

import pytest
import torch

from fleetune.errors import UserError
from fleetune.methods.linear_arithmetic import factors_sum, mean_rank, product_sum
from fleetune.models.library import Skill
from support import runs, tiny


def skill(name: str, a: list[list[float]], b: list[list[float]], scaling: float = 1.0) -> Skill:
    return Skill(name, {"q.lora_A": torch.tensor(a), "q.lora_B": torch.tensor(b)}, len(a), scaling)


ONE = skill("one", [[1.0, 2.0]], [[3.0]])
TWO = skill("two", [[2.0, 0.0], [0.0, 4.0]], [[1.0, 5.0]], scaling=2.0)


def test_factors_and_products_by_hand():
    """Scaling 1: TWO's B counts twice, (2 10). Mean of factors: A = ½ (1 2; 0 0) + ½ (2 0; 0 4) = (1.5 1; 0 2), B = ½ (3 0) +
    ½ (2 10) = (2.5 5). Mean of products: ½ (3 6) + ½ (4 40) = (3.5 23)."""
    on_factors = factors_sum([ONE, TWO], [0.5, 0.5], 1.0)
    assert on_factors["q.lora_A"].tolist() == [[1.5, 1.0], [0.0, 2.0]]
    assert on_factors["q.lora_B"].tolist() == [[2.5, 5.0]]
    on_product = product_sum([ONE, TWO], [0.5, 0.5], 1.0)
    assert (on_product["q.lora_B"] @ on_product["q.lora_A"]).tolist() == [[3.5, 23.0]]
    assert (mean_rank(on_factors), mean_rank(on_product)) == (2.0, 3.0)


@pytest.mark.parametrize("compose", [factors_sum, product_sum])
def test_one_hot_weights_give_that_adapter_and_equal_adapters_themselves(compose):
    for composed in (compose([ONE, TWO], [1.0, 0.0], 1.0), compose([ONE, ONE, ONE], [0.25, 0.25, 0.5], 1.0)):
        assert (composed["q.lora_B"] @ composed["q.lora_A"]).tolist() == [[3.0, 6.0]]


def test_the_order_of_adapters_does_not_matter():
    runs.close_tensors(factors_sum([ONE, TWO], [0.3, 0.7], 1.0), factors_sum([TWO, ONE], [0.7, 0.3], 1.0))


def test_weights_are_one_for_each_adapter():
    with pytest.raises(UserError, match="has 2 weights for 3 adapters: skill-0, skill-1, skill-2"):
        runs.problem(tiny.spec({"method.weights": [0.5, 0.5]}, method="linear-arithmetic"))
    with pytest.raises(UserError, match="names no adapters"):
        tiny.spec({"method.adapters": []}, method="linear-arithmetic")


def test_every_round_is_as_the_first_and_the_adapter_is_sent_once():
    done = runs.run(tiny.spec({"evaluation.generate": False, "evaluation.every": 1}, method="linear-arithmetic"))
    assert done.rounds["eval_loss"].nunique() == 1
    assert done.rounds["train_loss"].isna().all()
    assert done.rounds["uplink_bytes"].tolist() == [0, 0, 0]
    first = done.clients[done.clients["downlink_bytes"] > 0]
    assert first["client_id"].is_unique
    assert set(first["client_id"]) == set(done.clients["client_id"])
