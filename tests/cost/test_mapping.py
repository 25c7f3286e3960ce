"""A trained model whose blocks differ, costed as one that has fewer blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleetune.errors import UserError
from fleetune.methods.base import Report
from fleetune.pricing.mapping import CostedModel
from support import runs, tiny

DEPTHS = {"fedadapter": {"method.depth": 1}, "fedit": {}, "split-lora": {"method.split_point": 2}}


def mapped(method: str, num_layers: int) -> list[str]:
    """Names of the first round's tensors on an architecture of so many blocks; the trained model has four."""
    problem = runs.problem(tiny.spec(DEPTHS[method], method=method))
    state = problem.method.begin_round(problem.method.start(), 0, Report(0.0))
    clients = problem.method.groups(state, 0, [])
    payload = problem.method.broadcast(state, 0, clients[0] if clients else None)
    costed = CostedModel(problem.inputs.base, replace(problem.inputs.base.shape, num_layers=num_layers))
    made = costed.payload(payload, 4)
    return [name for name in [*made.tensors, *made.server] if name.startswith("layers.")]


@pytest.mark.parametrize("method", ["fedit", "split-lora"])
def test_blocks_that_are_alike_may_be_costed_as_fewer(method: str):
    assert {name.split(".")[1] for name in mapped(method, 2)} == {"0", "1"}


def test_blocks_that_differ_are_not_costed_as_fewer():
    """FedAdapter begins with an adapter in the last block alone, for which neither of two blocks would stand."""
    assert {name.split(".")[1] for name in mapped("fedadapter", 8)} == {"6", "7"}
    with pytest.raises(UserError, match=r"cost\.model.*has 2 blocks for 4 trained ones"):
        mapped("fedadapter", 2)
