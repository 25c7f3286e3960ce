"""Adapters after the halves of a block: bottlenecks, and those that a generator makes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fleetune.models.adapters import Bottleneck, rank_axis
from fleetune.models.base import BaseModel, placed
from fleetune.models.config import LoRAConfig
from fleetune.models.generated import GENERATOR_AXES, HISTOGRAM, Generated, Generator
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.tensors import Tensors
from fleetune.training.generate import generate
from support import random_models as models

HALVES = ("self_attn", "mlp")
SIZES = {"code": 3, "unit": 4, "latent": 2, "category": 5}


def network() -> Network:
    base = models.base_of("llama")
    return Network(base, Submodel.prefix(base.num_layers), LoRAConfig(rank=2))


def bottlenecks(base: BaseModel, *, width: int = 3, seed: int = 0) -> Tensors:
    """One after each half of every block, with no number that is zero."""
    random, hidden = torch.Generator().manual_seed(seed), base.shape.hidden_size
    shapes = {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}
    return {
        f"layers.{n}.{half}.bottleneck_{name}": 0.3 * torch.randn(shape, generator=random)
        for n in range(base.num_layers)
        for half in HALVES
        for name, shape in shapes.items()
    }


def generators(base: BaseModel, *, seed: int = 0) -> Tensors:
    """A generator with no number that is zero, and a histogram."""
    random = torch.Generator().manual_seed(seed)
    sizes = {**SIZES, "hidden": base.shape.hidden_size, "blocks": base.num_layers}
    out = {
        f"generator.{name}": 0.3 * torch.randn([sizes[axis] for axis in axes], generator=random)
        for name, axes in GENERATOR_AXES.items()
        if name != "histogram"
    }
    return {**out, HISTOGRAM: torch.rand(SIZES["category"], generator=random)}


KINDS = {"bottleneck": bottlenecks, "generated": generators}
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(network: Network, adapters: list[Tensors], ids: Tensor) -> Tensor:
    """Of clients with these adapters, whose examples ``ids`` (K b, S) are."""
    network.set_adapter({name: torch.stack([one[name] for one in adapters]) for name in adapters[0]})
    return network.logits(network.blocks(network.embed(ids)))


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for rounding: the random models' logits are of the order of 10."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_a_bottleneck_by_hand():
    """D = (1, 2), d = -1, U = (3, 4)^T, u = (0.5, -0.5).

    y = (1, 1):   relu(1 + 2 - 1) = 2, and U 2 + u = (6.5, 7.5)
    y = (-1, 0):  relu(-1 - 1) = 0, which leaves u
    """
    adapter = Bottleneck(
        torch.tensor([[[1.0, 2.0]]]),
        torch.tensor([[-1.0]]),
        torch.tensor([[[3.0], [4.0]]]),
        torch.tensor([[0.5, -0.5]]),
    )
    y = torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]])
    assert adapter(y).tolist() == [[[6.5, 7.5], [0.5, -0.5]]]


def test_a_generated_adapter_by_hand():
    """One number of code, one unit, width 2, two categories, two blocks; y = (3, 4), of length 5, in block 1.

    latent basis = 3 (1, 0) = (3, 0);  + shift (0, 4) = (3, 4);  / 5 = (0.6, 0.8)
    z = by_label p + by_block + by_token y / 5 + biases = 2 · 0.5 + 0.5 + 1 · 0.6 + 0.1 + 0.3 = 2.5
    w = 2.5 (0.6, 0.8) = (1.5, 2);  w y = 12.5;  + inner_bias -10.5 = 2
    GELU(2) = 2 Phi(2), with Phi the normal distribution function;  adapter = (1.5, 2) GELU(2) + (10, 20)
    """
    own = {
        "latent": [[[3.0]]],
        "basis": [[1.0, 0.0]],
        "shift": [[0.0, 4.0]],
        "by_block": [[7.0], [0.5]],
        "by_label": [[2.0, 0.0]],
        "by_label_bias": [0.1],
        "by_token": [[1.0, 0.0]],
        "by_token_bias": [0.3],
        "inner_bias": [-10.5],
        "outer_bias": [10.0, 20.0],
    }
    tensors = {f"generator.{name}": torch.tensor([value]) for name, value in own.items()}
    generator = Generator({**tensors, HISTOGRAM: torch.tensor([[0.5, 0.5]])})
    gelu = 2.0 * 0.5 * (1.0 + math.erf(2.0 / math.sqrt(2.0)))
    expected = torch.tensor([[[1.5 * gelu + 10.0, 2.0 * gelu + 20.0]]])
    torch.testing.assert_close(Generated(generator, 1)(torch.tensor([[[3.0, 4.0]]])), expected)


def test_a_generated_adapter_is_that_of_its_matrices_written_out():
    """Token by token: a list w of r D numbers, read as (D, r) on the way in and as (r, D) on the way out."""
    base, block = models.base_of("llama"), 1
    adapter = generators(base)
    own = {name.removeprefix("generator."): tensor for name, tensor in adapter.items()}
    hidden, units = base.shape.hidden_size, SIZES["unit"]
    y = torch.randn(1, 3, hidden, generator=torch.Generator().manual_seed(1))
    y[0, 2] = 0.0  # has no direction
    rows = (own["latent"].reshape(-1, SIZES["latent"]) @ own["basis"]).reshape(SIZES["code"], units * hidden)
    rows = rows + own["shift"].reshape(1, -1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    expected = []
    for token in y[0]:
        direction = token / token.norm() if token.any() else token
        code = own["by_label"] @ adapter[HISTOGRAM] + own["by_label_bias"] + own["by_block"][block]
        code = code + own["by_token"] @ direction + own["by_token_bias"]
        w = code @ rows
        inner = nn.functional.gelu(token @ w.reshape(hidden, units) + own["inner_bias"])
        expected.append(inner @ w.reshape(units, hidden) + own["outer_bias"])
    made = Generated(Generator({name: tensor[None] for name, tensor in adapter.items()}), block)(y)
    torch.testing.assert_close(made[0], torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_without_an_output_a_bottleneck_leaves_the_model_as_it_is():
    """U = 0 and u = 0."""
    plain, ids = network(), models.random_ids(2, 5)
    before = plain.logits(plain.blocks(plain.embed(ids)))
    adapter = bottlenecks(models.base_of("llama"))
    silent = {name: torch.zeros_like(t) if "bottleneck_up" in name else t for name, t in adapter.items()}
    close(logits(plain, [silent], ids), before)
    assert not torch.allclose(logits(plain, [adapter], ids), before, atol=0.1)
    plain.set_adapter(None)
    assert torch.equal(plain.logits(plain.blocks(plain.embed(ids))), before)


@every_kind
def test_clients_in_a_stack_get_what_they_get_alone(kind: str):
    ours, ids = network(), models.random_ids(6, 5)
    clients = [KINDS[kind](models.base_of("llama"), seed=k) for k in range(3)]
    together = logits(ours, clients, ids)
    for k, client in enumerate(clients):
        close(together[2 * k : 2 * k + 2], logits(ours, [client], ids[2 * k : 2 * k + 2]))
    assert not torch.allclose(together, logits(ours, [clients[0]], ids), atol=0.1)


@every_kind
def test_gradients_in_a_stack_are_those_alone(kind: str):
    """Of the sum of all logits, for every tensor; those of blocks that are computed again are the same."""
    ours, ids = network(), models.random_ids(4, 5)
    clients = [KINDS[kind](models.base_of("llama"), seed=k) for k in range(2)]

    def gradients(adapters: list[Tensors], ids: Tensor) -> Tensors:
        leaves = {name: torch.stack([one[name] for one in adapters]).requires_grad_() for name in adapters[0]}
        ours.set_adapter(leaves)
        ours.logits(ours.blocks(ours.embed(ids))).square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    together = gradients(clients, ids)
    assert together.keys() == clients[0].keys()
    ours.checkpointing = True
    for k, client in enumerate(clients):
        for name, gradient in gradients([client], ids[2 * k : 2 * k + 2]).items():
            expected = together[name][k]
            assert float((gradient[0] - expected).norm()) <= 1e-4 * float(expected.norm()), name


@every_kind
def test_a_token_depends_on_no_later_token_and_on_no_other_example(kind: str):
    """What comes after position 3, and what stands beside an example in its batch, changes nothing up to there."""
    ours, ids = network(), models.random_ids(3, 8)
    adapter = KINDS[kind](models.base_of("llama"))
    all_logits = logits(ours, [adapter], ids)
    other = torch.cat([ids[:, :4], models.random_ids(3, 4, seed=1)], dim=1)
    close(logits(ours, [adapter], other)[:, :4], all_logits[:, :4])
    assert not torch.allclose(logits(ours, [adapter], other)[:, 4:], all_logits[:, 4:], atol=0.1)
    for row in range(3):
        close(logits(ours, [adapter], ids[row : row + 1])[0], all_logits[row])


@every_kind
def test_generation_with_a_cache_is_that_without(kind: str):
    """Greedy, token by token, each time on all tokens so far; one prompt is padded on the left."""
    ours, ids = network(), models.random_ids(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    adapter = KINDS[kind](models.base_of("llama"))
    expected = []
    for row, start in ((0, 0), (1, 2)):
        tokens = ids[row : row + 1, start:]
        for _ in range(5):
            tokens = torch.cat([tokens, logits(ours, [adapter], tokens)[:, -1:].argmax(-1)], dim=1)
        expected.append(tokens[0, -5:])
    ours.set_adapter({name: tensor[None] for name, tensor in adapter.items()})
    made = generate(ours, ids, mask, max_new_tokens=5, end=-1, padding=0)
    assert torch.equal(made, torch.stack(expected))


def test_a_bottleneck_has_ranks_and_a_generator_has_none():
    """Fewer units of a bottleneck are a bottleneck; of a generator they would read its list of weights in another way."""
    base = models.base_of("llama")
    assert {rank_axis(name) for name in bottlenecks(base)} == {0, 1, None}
    assert {rank_axis(name) for name in generators(base)} == {None}


@every_kind
def test_in_bf16_only_the_products_are_rounded(kind: str):
    """Logits stay within 5 % of those in fp32, and gradients are fp32."""
    base, ids = models.base_of("llama"), models.random_ids(2, 5)
    adapter = KINDS[kind](base)
    exact = logits(network(), [adapter], ids)
    rounded = Network(
        placed(base, device="cpu", precision="bf16"),
        Submodel.prefix(base.num_layers),
        LoRAConfig(rank=2),
        precision="bf16",
    )
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
    ours = logits(rounded, [leaves], ids)
    assert 0 < float((ours.detach() - exact).norm() / exact.norm()) < 0.05
    ours.sum().backward()
    assert {leaf.grad.dtype for leaf in leaves.values() if leaf.grad is not None} == {torch.float32}
