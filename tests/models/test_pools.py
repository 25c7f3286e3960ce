"""Pools of frozen pairs and the gates that mix them, against sums written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fleetune.cost.operators import flop_formulas
from fleetune.cost.tracer import Tracer
from fleetune.models.pools import BlockGate, MoLE, Pool, mixture
from fleetune.models.routed import gathers, routed
from fleetune.tensors import Tensors

SITE, IN, OUT, RANKS, CLIENTS, TOKENS = "layers.0.self_attn.q_proj", 6, 5, (2, 3), 2, 4


def held(ranks: tuple[int, ...] = RANKS, **scales: Tensor) -> Tensors:
    """A pool of random adapters at `SITE`."""
    draws = torch.Generator().manual_seed(0)
    out: Tensors = {}
    for n, rank in enumerate(ranks):
        out[f"pool.{n}.{SITE}.lora_A"] = torch.randn(rank, IN, generator=draws)
        out[f"pool.{n}.{SITE}.lora_B"] = torch.randn(OUT, rank, generator=draws)
    return {**out, **{f"{SITE}.{name}": scale for name, scale in scales.items()}}


def pool(tensors: Tensors) -> Pool:
    found = Pool.of(tensors, SITE, dtype=torch.float32, device=torch.device("cpu"))
    assert found is not None
    return found


def product(tensors: Tensors, n: int, x: Tensor) -> Tensor:
    """E_n(x) = B_n A_n x, token by token."""
    return x @ tensors[f"pool.{n}.{SITE}.lora_A"].mT @ tensors[f"pool.{n}.{SITE}.lora_B"].mT


def inputs() -> Tensor:
    """(K b, S, in), with b = 1."""
    return torch.randn(CLIENTS, TOKENS, IN, generator=torch.Generator().manual_seed(1))


def mixed(tensors: Tensors, gates: Tensors) -> Tensor:
    gate = BlockGate.of(gates, 0)
    found = mixture(gates, SITE, pool(tensors), gate)
    assert found is not None
    if gate is not None:
        gate(inputs())
    return found(inputs())


def flow(weight: Tensor, bias: Tensor) -> Tensors:
    return {"layers.0.flow_weight": weight.expand(CLIENTS, 2, IN), "layers.0.flow_bias": bias.expand(CLIENTS, 2)}


@pytest.mark.parametrize(
    ("bias", "weights"), [((0.0, 0.0), (0.5, 0.5)), ((0.5, 0.5), (1.0, 1.0)), ((-0.5, 0.5), (0.0, 1.0))]
)
def test_a_flow_gate_of_zero_weighs_adapters_by_its_bias(bias: tuple[float, float], weights: tuple[float, float]):
    """softmax(0) = 1 / 2, and the bias is added outside: the mean, the sum, or the second adapter alone."""
    tensors, x = held(), inputs()
    expected = sum(w * product(tensors, n, x) for n, w in enumerate(weights))
    torch.testing.assert_close(mixed(tensors, flow(torch.zeros(1), torch.tensor(bias))), expected)


def test_clients_have_gates_of_their_own():
    """The second client's gate opens for the first adapter alone, token by token: logits 20 and -20 times its first number."""
    weight = torch.zeros(CLIENTS, 2, IN)
    weight[1, 0, 0], weight[1, 1, 0] = 20.0, -20.0
    tensors, x = held(), inputs()
    gates = flow(torch.zeros(1), torch.zeros(2))
    out = mixed(tensors, {**gates, "layers.0.flow_weight": weight})
    torch.testing.assert_close(out[0], (0.5 * (product(tensors, 0, x) + product(tensors, 1, x)))[0])
    share = torch.sigmoid(40.0 * x[1, :, :1])
    expected = share * product(tensors, 0, x)[1] + (1 - share) * product(tensors, 1, x)[1]
    torch.testing.assert_close(out[1], expected)


def test_moles_gate_reads_what_the_adapters_give():
    """G = softmax(<e, norm(E_1 E_2)> / tau) with tau = 2, written out for every token."""
    draws = torch.Generator().manual_seed(2)
    e, tensors, x = torch.randn(CLIENTS, 2, 2, OUT, generator=draws), held(), inputs()
    outputs = torch.stack([product(tensors, n, x) for n in range(2)], 2)  # (K, S, N, out)
    joined = outputs.flatten(2)
    normed = (joined - joined.mean(-1, keepdim=True)) / (joined.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    gates = torch.softmax(torch.einsum("knd,kgd->kng", normed, e.flatten(2)) / 2.0, -1)
    expected = (gates[..., None] * outputs).sum(2)
    ours = {f"{SITE}.mole_gate": e, f"{SITE}.mole_log_tau": torch.full((CLIENTS, 1), 2.0).log()}
    torch.testing.assert_close(mixed(tensors, ours), expected)
    assert isinstance(mixture(ours, SITE, pool(tensors), None), MoLE)


def routers(seed: int = 3) -> Tensors:
    return {f"{SITE}.router": torch.randn(CLIENTS, 5, IN, generator=torch.Generator().manual_seed(seed))}


def test_a_router_computes_the_best_ranks_of_each_token():
    """Two of five ranks, gates over the two that are kept, factors 3 for the best and 1 for the second, token by token."""
    tensors, x, gates = held(kept_scale=torch.tensor([3.0, 1.0])), inputs(), routers()
    found = pool(tensors)
    out = mixed(tensors, gates)
    for k in range(CLIENTS):
        for t in range(TOKENS):
            logits = gates[f"{SITE}.router"][k] @ x[k, t]
            best = logits.argsort(descending=True)[:2].tolist()
            share = torch.softmax(logits[best], 0)
            experts = [found.b[i] * (found.a[i] @ x[k, t]) for i in best]
            torch.testing.assert_close(out[k, t], 3.0 * share[0] * experts[0] + share[1] * experts[1])


def test_gates_over_all_are_their_part_of_the_whole_softmax():
    """With every rank chosen and factors M = 5, equal logits give gates 1 each: the sum of the adapters, in both ways."""
    x = inputs()
    none = {f"{SITE}.router": torch.zeros(CLIENTS, 5, IN)}
    for kind in ("kept_scale", "pool_scale"):
        tensors = held(**{kind: torch.full((5,), 5.0)})
        torch.testing.assert_close(mixed(tensors, none), product(tensors, 0, x) + product(tensors, 1, x))


def test_a_quota_of_the_whole_pool_is_the_dense_mixture():
    """sum_i g_i E_i(x) over all ranks, g = softmax(W x)."""
    tensors, x, gates = held(kept_scale=torch.ones(5)), inputs(), routers()
    found = pool(tensors)
    g = torch.softmax(x @ gates[f"{SITE}.router"].mT, -1)
    torch.testing.assert_close(mixed(tensors, gates), (g * (x @ found.a.mT)) @ found.b)


def test_experts_may_be_whole_adapters():
    """Two adapters of rank 2, one chosen per token with factor 1: its output alone."""
    tensors, x = held((2, 2), kept_scale=torch.ones(1)), inputs()
    router = torch.randn(CLIENTS, 2, IN, generator=torch.Generator().manual_seed(4))
    chosen = (x @ router.mT).argmax(-1)
    both = torch.stack([product(tensors, n, x) for n in range(2)], 2)
    expected = both.gather(2, chosen[..., None, None].expand(-1, -1, 1, OUT)).squeeze(2)
    torch.testing.assert_close(mixed(tensors, {f"{SITE}.router": router}), expected)


def test_a_low_rank_router_is_its_product_and_a_blocks_router_reads_the_stream():
    """Here the residual stream is the layer's own input, so that all three routers are one."""
    down, up = torch.randn(CLIENTS, 2, IN), torch.randn(CLIENTS, 5, 2)
    tensors = held(kept_scale=torch.ones(3))
    whole = mixed(tensors, {f"{SITE}.router": up @ down})
    torch.testing.assert_close(mixed(tensors, {f"{SITE}.router_down": down, f"{SITE}.router_up": up}), whole)
    torch.testing.assert_close(mixed(tensors, {"layers.0.block_router": up @ down}), whole)


def test_a_matrix_without_a_quota_is_the_base_model_s():
    assert mixture(routers(), SITE, pool(held()), None) is None
    assert mixture(routers(), SITE, None, None) is None


# -- the two forms of a routed product ------------------------------------------------------------------------------------
def arguments(num_experts: int, chosen: int, *, device: str = "cpu") -> list[Tensor]:
    """x, weights, index, a and b for 50 tokens of 32 numbers in and 24 out."""
    draws = torch.Generator().manual_seed(5)
    x, weights = torch.randn(50, 32, generator=draws), torch.rand(50, chosen, generator=draws)
    index = torch.stack([torch.randperm(num_experts, generator=draws)[:chosen] for _ in range(50)])
    a, b = torch.randn(num_experts, 32, generator=draws), torch.randn(num_experts, 24, generator=draws)
    made = [t.to(device) for t in (x, weights, index, a, b)]
    return [made[0].requires_grad_(), made[1].requires_grad_(), *made[2:]]


def test_both_forms_give_the_same_values_and_gradients():
    """The chosen experts alone, or all of them with weights 0: equal to 2e-6 of the largest value."""
    x, weights, index, a, b = arguments(16, 5)
    slope = torch.randn(50, 24, generator=torch.Generator().manual_seed(6))
    both = []
    for is_gathered in (False, True):
        y = routed(x, weights, index, a, b, is_gathered=is_gathered)
        both.append([y.detach(), *torch.autograd.grad((y * slope).sum(), [x, weights])])
    expected = torch.einsum("tq,tqo,tqi,ti->to", weights, b[index], a[index], x).detach()
    for masked, gathered in zip(*both, strict=True):
        assert (masked - gathered).abs().max() <= 2e-6 * masked.abs().max()
    assert (both[0][0] - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_faster_form_runs_and_the_gathered_one_is_traced():
    """On a processor, 5 of 16 experts are masked and 4 of 16 are gathered, in fp32; without data both are gathered."""
    for chosen, is_gathered in ((5, False), (4, True)):
        x, _, index, a, _ = arguments(16, chosen)
        assert gathers(x, index, a) == is_gathered
        assert not gathers(x.bfloat16(), index, a)
        assert gathers(x.to("meta"), index, a)


def test_gradients_are_those_of_finite_differences():
    x, weights, index, a, b = arguments(4, 2)
    x, weights, a, b = (t[:5].detach().double() for t in (x, weights, a, b))
    for is_gathered in (False, True):

        def of(x: Tensor, weights: Tensor, is_gathered: bool = is_gathered) -> Tensor:
            return routed(x, weights, index[:5], a, b, is_gathered=is_gathered)

        assert torch.autograd.gradcheck(of, (x.requires_grad_(), weights.requires_grad_()))


def traced(num_experts: int, chosen: int) -> tuple[int, int]:
    """FLOPs of a routed product and its gradient on tensors without data, and bytes that autograd keeps."""
    x, weights, index, a, b = arguments(num_experts, chosen)
    x, weights, index, a, b = (t.detach().to("meta") for t in (x, weights, index, a, b))
    tracer = Tracer(vocab_size=7)
    tracer.given([a, b], "weights")
    tracer.begin_step(0)
    with tracer.running():
        routed(x.requires_grad_(), weights.requires_grad_(), index, a, b).sum().backward()
    return sum(op.flops for op in tracer.ops), sum(tracer.saved_bytes)


@pytest.mark.parametrize("num_experts", [8, 512])
def test_what_is_traced_costs_what_is_chosen(num_experts: int):
    """2 T q (in + out) forward and as much again backward; kept are w and <a, x> in fp32 and the index: 16 bytes a choice."""
    for chosen in (1, 4):
        flops, saved = traced(num_experts, chosen)
        assert flops == 2 * 2 * 50 * chosen * (32 + 24)
        assert saved == 16 * 50 * chosen
    assert torch.ops.aten._embedding_bag in flop_formulas()
