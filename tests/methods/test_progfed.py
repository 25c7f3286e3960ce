"""ProgFed: the blocks of each stage, what they cost on the link, and what growth leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fleetune.errors import UserError
from fleetune.methods.base import Report, State
from fleetune.methods.progfed import ProgFed
from fleetune.tensors import Tensors
from support import runs, tiny

FAST = {"evaluation.generate": False}
EIGHT_ROUNDS = {**FAST, "rounds.num_rounds": 8, "evaluation.every": 8, "local.steps": 1, "method.stages": 4}
"""Stages of T / (2 S) = 1 round with 1, 2 and 3 blocks, then five rounds with all 4."""


def method_of(**settings: Any) -> ProgFed:
    method = runs.problem(tiny.spec(settings, method="progfed")).method
    assert isinstance(method, ProgFed)
    return method


def blocks(tensors: Tensors, first: int, last: int) -> Tensors:
    """The adapters of blocks [first, last)."""
    return {name: t for name, t in tensors.items() if first <= int(name.split(".")[1]) < last}


def test_one_stage_is_fedit_bit_for_bit():
    progfed = runs.run(tiny.spec({**FAST, "method.stages": 1}, method="progfed"))
    fedit = runs.run(tiny.spec(FAST))
    runs.same_tensors(progfed.state.tensors, fedit.state.tensors)
    for name in ("train_loss", "uplink_bytes", "downlink_bytes", "flops", "sim_seconds", "peak_memory_bytes"):
        assert progfed.clients[name].tolist() == fedit.clients[name].tolist(), name
    assert progfed.rounds["eval_loss"].iloc[-1] == fedit.rounds["eval_loss"].iloc[-1]


def test_the_papers_schedule():
    """S = 4 and T = 3000: three stages of T / (2 S) = 375 rounds, and 1875 for the whole model."""
    method = method_of(**{"rounds.num_rounds": 3000, "method.stages": 4})
    stages = [method.stage(t) for t in range(3000)]
    assert [stages.count(s) for s in range(4)] == [375, 375, 375, 1875]
    assert stages == sorted(stages)
    assert [method.num_blocks(s) for s in range(4)] == [1, 2, 3, 4]


def test_parts_of_unequal_size():
    """Four blocks in three stages: floor(4 s / 3) = 1, 2, 4."""
    assert [method_of(**{"method.stages": 3}).num_blocks(s) for s in range(3)] == [1, 2, 4]


def test_bytes_are_proportional_to_the_blocks_that_there_are():
    """(1 + 2 + 3 + 5 · 4) / (8 · 4) = 26/32 = 0.8125 of FedIT's, each way: the arithmetic of the paper's schedule for S = 4."""
    progfed = runs.run(tiny.spec(EIGHT_ROUNDS, method="progfed"))
    fedit = runs.run(tiny.spec({name: v for name, v in EIGHT_ROUNDS.items() if name != "method.stages"}))
    assert progfed.rounds["depth"].tolist() == [1, 2, 3, 4, 4, 4, 4, 4]
    for name in ("uplink_bytes", "downlink_bytes"):
        assert (4 * progfed.rounds[name]).tolist() == (progfed.rounds["depth"] * fedit.rounds[name]).tolist()
        assert progfed.rounds[name].sum() == 0.8125 * fedit.rounds[name].sum()
    assert (progfed.clients["flops"].groupby(progfed.clients["round"]).max().diff().iloc[1:4] > 0).all()


def test_growth_leaves_the_trained_blocks_as_they_are():
    """At each boundary the new payload holds the bits of the old blocks, and fresh pairs with B = 0 for the new ones."""
    _, passed = runs.recorded(tiny.spec(EIGHT_ROUNDS, method="progfed"))
    sent = {one.unit.round_idx: one.payloads[0].tensors for one in passed}
    fresh = method_of().context.fresh_adapter()
    for round_idx, depth in ((0, 1), (1, 2), (2, 3), (3, 4)):
        runs.same_tensors(blocks(sent[round_idx], depth - 1, depth), blocks(fresh, depth - 1, depth))
        assert sent[round_idx].keys() == blocks(fresh, 0, depth).keys()
    method = method_of(**{name: v for name, v in EIGHT_ROUNDS.items() if name.startswith(("method", "rounds"))})
    state = method.begin_round(State(fresh), 0, Report(0.0))
    for round_idx in range(1, 8):
        before, state = state, method.begin_round(state, round_idx, Report(0.0))
        runs.same_tensors(before.tensors, state.tensors)


def test_in_the_last_stage_the_model_is_whole():
    done = runs.run(tiny.spec(EIGHT_ROUNDS, method="progfed"))
    method, state = done.problem.method, done.state
    evaluated = method.evaluated(state, lambda: iter(()))
    assert not isinstance(evaluated, dict)
    assert evaluated.model.is_base(4)
    runs.same_tensors(evaluated.adapter, done.deployed.adapter)
    assert len(evaluated.adapter) == len(method.context.fresh_adapter())


def test_in_a_warm_up_round_the_newest_part_alone_is_trained_and_sent():
    """Two stages of two rounds: round 2 begins the second one, so only blocks 2 and 3 move, and half as much goes up."""
    warm = {
        **FAST,
        "rounds.num_rounds": 4,
        "evaluation.every": 4,
        "method.rounds_per_stage": 2,
        "method.warm_up_rounds": 1,
    }
    done, passed = runs.recorded(tiny.spec(warm, method="progfed"))
    sent = {one.unit.round_idx: one.payloads[0].tensors for one in passed}
    runs.same_tensors(blocks(sent[2], 0, 2), blocks(sent[3], 0, 2))
    assert not torch.equal(sent[2]["layers.3.mlp.down_proj.lora_B"], sent[3]["layers.3.mlp.down_proj.lora_B"])
    up, down = done.rounds["uplink_bytes"].tolist(), done.rounds["downlink_bytes"].tolist()
    assert [2 * up[2], 2 * down[1]] == [up[3], down[2]]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"method.stages": 5}, "method.stages"),
        ({"method.stages": 4}, "rounds.num_rounds"),
        ({"method.rounds_per_stage": 3}, "rounds.num_rounds"),
        ({"method.warm_up_rounds": 1}, "method.warm_up_rounds"),
    ],
)
def test_what_leaves_a_stage_without_blocks_or_rounds_is_refused(overrides: dict[str, int], field: str):
    """Five parts of four blocks; four stages, or one of three rounds before the last, in three rounds; a stage of warm-up."""
    with pytest.raises(UserError) as raised:
        runs.problem(tiny.spec(overrides, method="progfed"))
    assert raised.value.field == field
