"""What a client must be sent beside its payload is costed on the architecture that is costed, not on the one that is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fleetune.methods.base import Payload, Report, State
from fleetune.models.architectures import architecture
from fleetune.pricing.pricing import Pricing
from fleetune.problem import Problem
from support import runs, tiny

BLOCK = 202_383_360
"""Parameters of a block of LLaMA2-7B: 4 · 4096² + 3 · 4096 · 11008 + 2 · 4096."""
TINY_BLOCK = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32


def devft(**overrides: Any) -> tuple[Problem, Payload]:
    """DevFT that ships its submodels, and the first stage's payload: one of the four trained blocks."""
    made = runs.problem(tiny.spec({"method.ship_submodel": True, **overrides}, method="devft"))
    state = made.method.begin_round(made.method.start(), 0, Report(0.0))
    return made, made.method.broadcast(state, 0, None)


def test_the_block_is_that_of_the_published_architecture():
    assert architecture("llama2-7b").num_params(4) - architecture("llama2-7b").num_params(3) == BLOCK


@pytest.mark.parametrize(("costed", "num_bytes"), [(None, 4 * TINY_BLOCK), ("llama2-7b", 4 * 8 * BLOCK)])
def test_shipped_blocks_are_those_of_the_costed_architecture(costed: str | None, num_bytes: int):
    """One trained block of four stands for 8 of LLaMA2-7B's 32; both are sent in the trained model's fp32."""
    made, payload = devft(**({"cost.model": costed} if costed else {}))
    assert payload.provision is not None
    pricing = Pricing(made)
    assert pricing.provision_bytes(payload, None) == num_bytes
    assert pricing.provision_bytes(payload, "stage--1") == num_bytes
    assert pricing.provision_bytes(payload, payload.provision.key) == 0


def test_a_shrunk_payload_is_provided_with_fewer_blocks():
    made, _ = devft(**{"cost.model": "llama2-7b"})
    state = made.method.begin_round(made.method.start(), 1, Report(0.0))  # the second stage has two blocks
    payload = made.method.broadcast(state, 1, None)
    smaller = made.method.shrunk(payload, 1)
    pricing = Pricing(made)
    assert pricing.provision_bytes(payload, None) == 4 * 16 * BLOCK
    assert pricing.provision_bytes(smaller, None) == 4 * 8 * BLOCK


def test_floras_stacks_have_the_costed_sizes_and_their_own_rank():
    """Ranks 3 and 2 on q_proj alone: 32 blocks of 5 · (4096 + 4096) numbers. From rank 2048 on the dense sum is smaller."""
    settings = {"cost.model": "llama2-7b", "model.lora.targets": ["q_proj"]}
    made = runs.problem(tiny.spec(settings, method="flora"))
    pricing = Pricing(made)
    for stacked, numbers in (([3, 2], 5 * 2 * 4096), ([4000], 4096 * 4096)):
        with torch.device("meta"):
            state = State(made.method.start().tensors, {"stacked": stacked})
        payload = made.method.broadcast(state, 2, 2)
        assert Pricing(made).provision_bytes(payload, None) == 4 * 32 * numbers
    assert pricing.provision_bytes(payload, "1") == 0
