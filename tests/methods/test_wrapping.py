"""A method inside DevFT: its settings, its names, and that DevFT hands on all that it does."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from fleetune.errors import UserError
from fleetune.methods.base import Method, Report
from fleetune.methods.devft import DevFT, DevFTConfig
from fleetune.methods.fedprox import FedProxConfig
from fleetune.methods.wrapping import INNER, block_first, own_name
from support import runs, tiny

FAST = {"evaluation.generate": False}
NAME = "self_attn.q_proj.lora_A"


def test_names_begin_with_their_block_and_come_back():
    named = {"layers.3.mlp.up_proj.lora_A": "layers.3.mlp.up_proj.lora_A"}
    named["domain.0.layers.3.mlp.up_proj.lora_A"] = "layers.3.domain.0.|mlp.up_proj.lora_A"
    assert {name: block_first(name) for name in named} == named
    assert [own_name(name) for name in named.values()] == list(named)


def test_the_inner_methods_settings_reach_it():
    method = runs.problem(tiny.spec({"method.aggregation": "fedprox", "method.inner.mu": 0.5}, method="devft")).method
    assert isinstance(method, DevFT)
    assert method.inner.config == FedProxConfig(mu=0.5)
    assert not DevFTConfig(aggregation="fedprox").traits.groups
    assert DevFTConfig(aggregation="dofit").traits.groups


@pytest.mark.parametrize(
    ("aggregation", "inner", "field", "told"),
    [
        ("fedprox", {"muu": 1.0}, "method.inner.muu", "did you mean 'mu'"),
        ("fedprox", {"mu": -1.0}, "method.inner.mu", "greater than or equal to 0"),
        ("fedprox", {"name": "fedavg"}, "method.inner.name", "method.aggregation"),
        ("fedit", {"mu": 1.0}, "method.inner.mu", "fedit has no settings"),
        ("dofit", {"exchange": "swap"}, "method.inner.exchange", "'perturb' or 'mean'"),
        ("dofit", {"domains": 7}, "method.inner.domains", "fleet of 6 clients"),
        ("dofit", {"domains": 5}, "method.inner.domains", "4 categories"),
    ],
)
def test_mistakes_are_told_with_their_place(aggregation: str, inner: dict[str, Any], field: str, told: str):
    with pytest.raises(UserError, match=told) as raised:
        runs.problem(tiny.spec({"method.aggregation": aggregation, "method.inner": inner}, method="devft"))
    assert raised.value.field == field


@pytest.mark.parametrize("name", INNER)
def test_devft_hands_on_every_hook_that_an_inner_method_has(name: str):
    """A hook that DevFT lacks would be its own default, in silence. `begin_round` is DevFT's alone."""
    hooks = {hook for hook, _ in inspect.getmembers(Method, inspect.isfunction)}
    own = {hook for cls in INNER[name].__mro__ if cls not in Method.__mro__ for hook in vars(cls) if hook in hooks}
    assert own - set(vars(DevFT)) == set()
    assert "begin_round" not in own


@pytest.mark.parametrize("inner", [("fedprox", {"mu": 0.1}), ("dofit", {"domains": 2, "step": 0.05})])
def test_the_whole_model_at_once_is_the_inner_method(inner: tuple[str, dict[str, Any]]):
    """One stage of all four blocks: nothing is fused, so every bit is the inner method's."""
    name, settings = inner
    whole = {**FAST, "method.initial_capacity": 4, "method.aggregation": name, "method.inner": settings}
    devft, plain = runs.run(tiny.spec(whole, method="devft")), runs.run(tiny.spec(FAST, method=name))
    runs.same_tensors(devft.deployed.adapter, plain.deployed.adapter)
    assert devft.rounds["train_loss"].tolist() == plain.rounds["train_loss"].tolist()
    for column in [column for column in plain.rounds if column.startswith("eval_loss")]:
        assert devft.rounds[column].iloc[-1] == plain.rounds[column].iloc[-1], column
    assert devft.clients["uplink_bytes"].tolist() == plain.clients["uplink_bytes"].tolist()


def test_every_domain_is_written_back_and_fused_by_itself():
    """After the stage of one block each domain's block stands in all four places; DBLF of equal blocks is the block itself."""
    spec = tiny.spec(
        {**FAST, "method.aggregation": "dofit", "method.inner": {"domains": 2, "step": 0.05}}, method="devft"
    )
    first = runs.run(spec, stop_after=1)
    method = first.problem.method
    begun = method.begin_round(first.state, 1, Report(0.0))
    for j in (0, 1):
        learnt = first.state.tensors[f"stage.layers.0.domain.{j}.|{NAME}"]
        for block in range(4):
            whole = begun.tensors[f"global.layers.{block}.domain.{j}.|{NAME}"]
            assert torch.equal(whole, learnt)
        for block in range(2):
            torch.testing.assert_close(
                begun.tensors[f"stage.layers.{block}.domain.{j}.|{NAME}"], learnt, rtol=1e-6, atol=1e-7
            )
        sent = method.broadcast(begun, 1, j).tensors
        assert torch.equal(sent[f"layers.0.{NAME}"], begun.tensors[f"stage.layers.0.domain.{j}.|{NAME}"])
