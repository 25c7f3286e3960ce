"""bf16 products: what is rounded and what is not, and that clients learn what they learn in fp32."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from fleetune.models import block
from fleetune.models.base import placed
from fleetune.models.config import LoRAConfig
from fleetune.models.family import ARCHITECTURES
from fleetune.models.fused import swiglu
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel, combined
from fleetune.tensors import Tensors, select
from support import random_models as models
from support import runs, tiny

LORA = LoRAConfig(rank=2, alpha=4.0)
CASES: dict[str, dict[str, Any]] = {
    "fedit": {},
    "fedsa-lora": {},
    "devft": {},
    "split-lora": {},
    "split-lora per_client": {"method.server": "per_client"},
}


def network_of(architecture: str, precision: str, quantization: str = "none") -> Network:
    base = placed(models.base_of(architecture, quantization), device="cpu", precision=precision)
    return Network(base, Submodel.prefix(base.num_layers), LORA, precision=precision)


def logits_and_gradients(network: Network, architecture: str) -> tuple[torch.Tensor, Tensors]:
    """Logits of two clients with two examples each, and the gradients of a weighted sum of them."""
    adapter = models.random_adapter(models.base_of(architecture), LORA)
    leaves = {name: torch.stack([tensor, -tensor]).requires_grad_() for name, tensor in adapter.items()}
    network.set_adapter(leaves)
    logits = network.logits(network.blocks(network.embed(models.random_ids(4, 7))))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    return logits.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_more_is_lost_than_by_transformers_under_autocast(architecture: str):
    """Logits and dL/d(embeddings), beside fp32: rounded weights, bf16 norms and rotations cost what PyTorch's autocast does."""
    ids, model = models.random_ids(4, 7), models.reference(architecture)
    weights = torch.randn(4, 7, models.SIZES["vocab_size"], generator=torch.Generator().manual_seed(1))

    def ours(precision: str) -> tuple[torch.Tensor, ...]:
        network = network_of(architecture, precision)
        h = network.embed(ids).detach().requires_grad_()
        logits = network.logits(network.blocks(h))
        (gradient,) = torch.autograd.grad((logits * weights).sum(), h)
        return logits.detach(), gradient

    h = model.model.embed_tokens(ids).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs_embeds=h).logits.float()
    (gradient,) = torch.autograd.grad((logits * weights).sum(), h)
    for rounded, theirs, exact in zip(ours("bf16"), (logits.detach(), gradient), ours("fp32"), strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < distance(rounded, exact) < 1.5 * distance(theirs, exact)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_adapters_have_fp32_gradients_over_every_kind_of_base(quantization: str):
    """Two clients' adapters; a tenth is what bf16's 0.4 % becomes over the sums of three blocks of large weights."""
    exact, exact_gradients = logits_and_gradients(network_of("llama", "fp32", quantization), "llama")
    rounded, gradients = logits_and_gradients(network_of("llama", "bf16", quantization), "llama")
    assert 0 < distance(rounded, exact) < 0.1
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert 0 < distance(flat(gradients), flat(exact_gradients)) < 0.1


def test_matrices_are_rounded_and_so_are_the_activations_between_products(monkeypatch: pytest.MonkeyPatch):
    """Norms' gains and biases (qwen2) stay fp32, and so does the residual stream; a projection's output is bf16."""
    network = network_of("qwen2", "bf16")
    for name, parameter in network.model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim == 2 else torch.float32), name
    seen = []

    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        seen.append((gate.dtype, up.dtype))
        return swiglu(gate, up)

    monkeypatch.setattr(block, "swiglu", gated)
    h = network.blocks(network.embed(models.random_ids(1, 4)))
    assert seen == network.num_layers * [(torch.bfloat16, torch.bfloat16)]
    assert h.dtype == torch.float32


def test_networks_of_one_worker_share_the_rounded_weights():
    """A selection of blocks is no second copy; on the CPU in fp32 there is no copy at all."""
    base = models.base_of("llama")
    rounded = placed(base, device="cpu", precision="bf16")
    whole, part = (
        Network(rounded, submodel, LORA, precision="bf16") for submodel in (Submodel.prefix(3), Submodel.select([2, 0]))
    )
    ours, theirs = part.layers[0].mlp.up_proj.base.weight, whole.layers[2].mlp.up_proj.base.weight
    assert ours.data_ptr() == theirs.data_ptr()
    same = placed(base, device="cpu", precision="fp32")
    assert all(same.weights[name] is weight for name, weight in base.weights.items())


def test_a_fused_block_is_summed_in_fp32():
    """(a + a + a) / 3 is a: rounding each third of 1 + 2^-7 to bf16's 8 bits would lose its last one."""
    a = torch.tensor([1 + 2**-7], dtype=torch.bfloat16)
    fused = combined([a, a, a], [1 / 3, 1 / 3, 1 / 3])
    assert fused.dtype == torch.bfloat16
    assert fused.item() == a.item()


@functools.cache
def run(case: str, precision: str, cohort: int = 2) -> runs.Finished:
    sgd = {"local.optimizer": "sgd", "local.learning_rate": 1.0}  # AdamW's first steps blow up what is nearly zero
    changed = {"execution.precision": precision, "execution.cohort": cohort, **sgd, **CASES[case]}
    return runs.run(tiny.spec(changed, method=case.partition(" ")[0]))


def adapter_of(done: runs.Finished) -> torch.Tensor:
    return flat(done.deployed.adapter)


@pytest.mark.parametrize("case", CASES)
def test_clients_learn_in_bf16_what_they_learn_in_fp32(case: str):
    """The losses of three rounds to 1e-3, and every B, which starts at zero, to 2 %."""
    exact, rounded = run(case, "fp32"), run(case, "bf16")
    for column in ("train_loss", "eval_loss"):
        assert rounded.rounds[column].dropna().to_list() != exact.rounds[column].dropna().to_list()
        np.testing.assert_allclose(rounded.rounds[column], exact.rounds[column], rtol=1e-3)
    assert rounded.rounds["eval_loss"].iloc[-1] < rounded.events[0]["baseline"]["eval_loss"]
    assert all(t.dtype != torch.bfloat16 for t in rounded.state.tensors.values())
    learnt = [flat(select(done.deployed.adapter, lambda name: name.endswith(".lora_B"))) for done in (rounded, exact)]
    assert distance(*learnt) < 0.02


@pytest.mark.parametrize("case", CASES)
def test_stacked_clients_learn_what_they_learn_one_by_one_in_bf16(case: str):
    """Cohorts of three against cohorts of one, within one rounding of bf16."""
    assert distance(adapter_of(run(case, "bf16", 3)), adapter_of(run(case, "bf16", 1))) < 2**-8
