"""MoLE and LoRA-Flow, and what every method with a pool of adapters shares: what travels, what is shipped, what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fleetune.errors import UserError
from fleetune.models.adapters import is_pair
from fleetune.models.architectures import architecture
from fleetune.models.network import Network
from fleetune.models.peft_format import CONFIG, OWN_CONFIG
from fleetune.models.pools import POOL
from fleetune.models.submodel import Submodel
from fleetune.pricing.mapping import CostedModel
from fleetune.reports.figures.adapter_pool import adapter_pool
from fleetune.tensors import Tensors
from fleetune.training.gates import balance, mean_gates
from support import REPOSITORY, runs, tiny

FAST: dict[str, Any] = {"evaluation.generate": False}
METHODS = ("lora-flow", "mole", "smartfed")


def logits(network: Network, adapter: Tensors, held: Tensors) -> torch.Tensor:
    network.hold(held)
    network.set_adapter({name: tensor[None] for name, tensor in adapter.items()})
    with torch.no_grad():
        return network.logits(network.blocks(network.embed(torch.arange(3, 11)[None])))


def test_lora_flow_trains_as_many_numbers_as_its_paper_says():
    """262,208 of LLaMA2-7B with two adapters: 32 blocks of 2 x 4096 + 2."""
    two = {"method.adapters": [tiny.library_folder((2, 3))]}
    made = runs.problem(tiny.spec({**FAST, **two}, method="lora-flow"))
    costed = CostedModel(made.inputs.base, architecture("llama2-7b"), axes=made.method.axes)
    assert costed.num_bytes(made.method.start().tensors, 4) == 4 * 262_208 == 4 * 32 * (2 * 4096 + 2)


def test_mole_trains_n_n_out_and_a_temperature_for_every_matrix():
    """Three adapters, four blocks: 9 out + 1 for q, k, v, o and down (out 32), gate and up (out 48)."""
    start = runs.problem(tiny.spec(FAST, method="mole")).method.start().tensors
    assert sum(t.numel() for t in start.values()) == 4 * (9 * (5 * 32 + 2 * 48) + 7)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_gates_travels_and_the_pool_is_fetched_once(method: str):
    """No tensor of a pool goes up or comes down with a payload; a client's first downlink has the pool on top."""
    done, passed = runs.recorded(tiny.spec(FAST, method=method))
    for one in passed:
        assert one.partial_sum is not None
        names = {*one.partial_sum.unpack(), *(n for p in one.payloads.values() for n in p.tensors)}
        assert not any(name.startswith(POOL) or is_pair(name) for name in names)
    # 3 adapters of ranks 2 + 3 + 2: 7 ranks of in + out numbers, at 5 matrices of 64 and 2 of 80 in each of 4 blocks.
    pool = 4 * 4 * 7 * (4 * 64 + 3 * 80)
    seen: set[int] = set()
    for _, row in done.clients.sort_values("round").iterrows():
        gates = 0 if method == "smartfed" and row["round"] == 1 else row["downlink_bytes"] % pool
        assert row["downlink_bytes"] == gates + (0 if row["client_id"] in seen else pool)
        seen.add(row["client_id"])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_shipped_gives_our_logits_in_transformers(method: str):
    """The lines of the page that load it, run as they stand."""
    done = runs.run(tiny.spec(FAST, method=method))
    folder = done.run_dir.path / "adapter"
    assert (folder / OWN_CONFIG).exists()
    assert not (folder / CONFIG).exists()
    lines = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / "methods" / f"{method}.md").read_text(), re.S)
    assert lines
    names: dict[str, Any] = {}
    exec(lines[1].replace(f"runs/{method}/adapter", str(folder)), names)
    with torch.no_grad():
        theirs = names["model"](torch.arange(3, 11)[None]).logits
    spec, inputs = done.problem.spec, done.problem.inputs
    network = Network(inputs.base, Submodel.prefix(4), spec.model.lora)
    ours = logits(network, done.deployed.adapter, done.deployed.model.held)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    plain = logits(network, {}, {})
    assert (ours - plain).abs().max() > 1e-2  # the adapters are in it


@pytest.mark.parametrize("method", METHODS)
def test_a_token_does_not_see_the_tokens_after_it(method: str):
    made = runs.problem(tiny.spec(FAST, method=method))
    model = made.method.evaluated(made.method.start(), lambda: iter(()))
    network = runs.worker(made).network(model.model)
    draws = torch.Generator().manual_seed(0)
    gates = {name: 0.3 * torch.randn(t.shape, generator=draws) for name, t in model.adapter.items()}
    network.set_adapter({name: tensor[None] for name, tensor in gates.items()})
    one, other = torch.arange(3, 11)[None], torch.arange(3, 11)[None].clone()
    other[0, -1] = 40
    with torch.no_grad():
        a, b = (network.blocks(network.embed(ids)) for ids in (one, other))
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_one_adapter_s_gate_is_that_adapter():
    """LoRA-Flow with biases -1/3, -1/3 and 2/3 begins with the third adapter: what a run of plain pairs computes with it."""
    bias = {"method.bias": [-1 / 3, -1 / 3, 2 / 3]}
    made = runs.problem(tiny.spec({**FAST, **bias}, method="lora-flow"))
    model = made.method.evaluated(made.method.start(), lambda: iter(()))
    network = runs.worker(made).network(model.model)
    gated = logits(network, model.adapter, model.model.held)
    pair = made.method.skills[2].pairs(made.spec.model.lora.scaling)
    torch.testing.assert_close(gated, logits(network, pair, {}), rtol=1e-4, atol=1e-5)


def test_balance_is_least_if_adapters_are_used_equally():
    """N log N = 2 log 2 at (1/2, 1/2); for means (0.25, 0.75): -log(0.25 x 0.75)."""
    equal, other = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert balance([equal, equal]).item() == pytest.approx(2 * math.log(2))
    assert balance([other]).item() == pytest.approx(-math.log(0.25 * 0.75))
    assert balance([equal, 2 * other - equal]).item() == pytest.approx(balance([other]).item())


def test_means_are_over_the_positions_that_predict_a_counted_token():
    """Of four positions the second and third predict tokens that count: gates 2 and 3, mean 2.5; none at all gives 0."""
    gates = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]] * 2)
    labels = torch.tensor([[-100, -100, 7, 7], [-100] * 4])
    assert mean_gates(gates, labels).tolist() == [[2.5], [0.0]]


def test_the_balance_is_in_the_training_loss():
    """alpha times at least 3 log 3: with alpha = 10, gates are near equal and nearly nothing is on top of that."""
    plain = runs.run(tiny.spec({**FAST, "method.balance": 0.0, "rounds.num_rounds": 1}, method="mole"))
    heavy = runs.run(tiny.spec({**FAST, "method.balance": 10.0, "rounds.num_rounds": 1}, method="mole"))
    extra = heavy.rounds["train_loss"].iloc[0] - plain.rounds["train_loss"].iloc[0]
    assert extra == pytest.approx(10 * 3 * math.log(3), rel=0.05)


def test_checkpointing_changes_nothing():
    """MoLE's loss reads gates that blocks have computed: gradients go through blocks that are computed again."""
    both = [
        runs.run(tiny.spec({**FAST, "local.checkpointing": value}, method="mole")).state.tensors
        for value in (False, True)
    ]
    runs.close_tensors(both[0], both[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_keeps_a_figure_of_its_pool(method: str, tmp_path: Path):
    done = runs.run(tiny.spec({**FAST, "method.record_fusion": True}, method=method))
    kept = done.run_dir.stages()[0]
    assert set(kept["fusion"]) == set(kept["quotas"]) == set(done.problem.method.context.sites)
    if method == "mole":  # a softmax
        assert [sum(values) for values in kept["fusion"].values()] == pytest.approx([1.0] * 28)
    if method == "lora-flow":  # one gate for the seven matrices of a block
        assert len({tuple(values) for values in kept["fusion"].values()}) == 4
    drawn = adapter_pool(done.run_dir, path=tmp_path / "pool.png")
    assert drawn is not None
    assert drawn.stat().st_size > 10_000
    plain = runs.run(tiny.spec({**FAST, "rounds.num_rounds": 1}, method="fedit"))
    assert adapter_pool(plain.run_dir, path=tmp_path / "none.png") is None


@pytest.mark.parametrize(
    ("method", "settings", "field"),
    [
        ("lora-flow", {"adapters": [tiny.library_folder((2,))]}, "method.adapters"),
        ("mole", {"adapters": [tiny.library_folder((2,))]}, "method.adapters"),
        ("smartfed", {"adapters": [tiny.library_folder((2,))]}, "method.adapters"),
        ("lora-flow", {"bias": [0.0, 1.0]}, "method.bias"),
        ("smartfed", {"quota": 8}, "method.quota"),
        ("smartfed", {"experts": "adapter"}, "method.experts"),
        ("smartfed", {"experts": "adapter", "adapters": [tiny.library_folder((2, 2))], "quota": 3}, "method.quota"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, settings: dict[str, Any], field: str):
    fields = {f"method.{name}": value for name, value in settings.items()}
    with pytest.raises(UserError) as found:
        runs.problem(tiny.spec({**FAST, **fields}, method=method))
    assert found.value.field == field
    assert found.value.hint


def test_pools_on_another_architecture_have_its_sizes():
    """The pool of the tiny model, laid out for LLaMA2-7B: 7 ranks of in + out numbers at 7 matrices of 32 blocks."""
    made = runs.problem(tiny.spec(FAST, method="mole"))
    costed = CostedModel(made.inputs.base, architecture("llama2-7b"), axes=made.method.axes)
    held = made.method.evaluated(made.method.start(), lambda: iter(())).model.held
    assert costed.num_bytes(held, 4) == 4 * 32 * 7 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
