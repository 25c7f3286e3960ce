"""The network's own block loop is the model that transformers runs, forward, backward and in generation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fleetune.models.block import norm
from fleetune.models.config import LoRAConfig
from fleetune.models.decoder import Rotary
from fleetune.models.family import ARCHITECTURES
from fleetune.models.fused import rms_norm, rotary
from fleetune.models.network import Network, linear_sites
from fleetune.models.submodel import Submodel
from fleetune.training.generate import generate
from support import random_models as models

LORA = LoRAConfig(rank=2, alpha=4.0)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def network_of(architecture: str, lora: LoRAConfig = LORA) -> Network:
    base = models.base_of(architecture)
    return Network(base, Submodel.prefix(base.num_layers), lora)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def logits_of(network: Network, ids: torch.Tensor) -> torch.Tensor:
    return network.logits(network.blocks(network.embed(ids)))


@every_architecture
def test_logits_are_those_of_transformers(architecture: str):
    """Without adapters; bias (qwen2), head norms (qwen3), tied head (llama), grouped queries (all)."""
    ids = models.random_ids(3, 11)
    expected = models.reference(architecture)(ids).logits.detach()
    close(logits_of(network_of(architecture), ids), expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_positions_are_those_of_transformers(rope: dict[str, Any]):
    """Every scaling that is supported, at positions up to the last."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    base = models.base_of("llama")
    scaled = dataclasses.replace(base, config={**base.config, "rope_parameters": {"rope_theta": 1e4, **rope}})
    positions, h = torch.arange(models.SIZES["max_position_embeddings"])[None], torch.zeros(1)
    expected = LlamaRotaryEmbedding(scaled.hf_config())(h, positions)
    for ours, theirs in zip(Rotary(scaled)(h, positions), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    plain = Rotary(base)(h, positions)[0]
    assert rope["rope_type"] == "dynamic" or not torch.equal(plain, expected[0])


@every_architecture
def test_gradients_are_those_of_transformers(architecture: str):
    """dL/d(embeddings) through all blocks: the fused norm and rotation are differentiated as autograd does."""
    ids = models.random_ids(2, 7)
    network, reference = network_of(architecture), models.reference(architecture)
    weights = torch.randn(2, 7, models.SIZES["vocab_size"], generator=torch.Generator().manual_seed(1))
    ours = network.embed(ids).detach().requires_grad_()
    (network.logits(network.blocks(ours)) * weights).sum().backward()
    theirs = reference.model.embed_tokens(ids).detach().requires_grad_()
    (reference(inputs_embeds=theirs).logits * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * float(theirs.grad.abs().max()))


@every_architecture
def test_padding_on_the_right_does_not_touch_real_tokens(architecture: str):
    """Attention is causal, so what comes after a token cannot change it, and no mask is needed."""
    network, ids = network_of(architecture), models.random_ids(1, 6)
    padded = torch.cat([ids, models.random_ids(1, 4, seed=1)], dim=1)
    close(logits_of(network, padded)[:, :6], logits_of(network, ids))


@every_architecture
def test_blocks_can_be_run_in_parts(architecture: str):
    network, ids = network_of(architecture), models.random_ids(2, 5)
    h = network.embed(ids)
    torch.testing.assert_close(network.blocks(network.blocks(h, 0, 1), 1), network.blocks(h), rtol=0, atol=0)


@every_architecture
def test_stacked_adapters_act_on_their_own_client(architecture: str):
    """Three clients' adapters at once give each client what its adapter gives alone."""
    network, base = network_of(architecture), models.base_of(architecture)
    adapters = [models.random_adapter(base, LORA, seed=k) for k in range(3)]
    ids = models.random_ids(6, 5)
    network.set_adapter({name: torch.stack([a[name] for a in adapters]) for name in adapters[0]})
    together = logits_of(network, ids)
    for k, adapter in enumerate(adapters):
        network.set_adapter({name: t[None] for name, t in adapter.items()})
        close(together[2 * k : 2 * k + 2], logits_of(network, ids[2 * k : 2 * k + 2]))
    network.set_adapter(None)
    assert not torch.allclose(together, logits_of(network, ids), atol=1e-2)


def test_an_adapter_is_scaling_b_a_added_to_the_weight():
    """W x + alpha / r B A x, against a network whose weight is W + alpha / r B A."""
    base = models.base_of("llama")
    lora = LoRAConfig(rank=2, alpha=6.0, targets=("v_proj",))
    adapter = models.random_adapter(base, lora)
    merged = dict(base.weights)
    for site in linear_sites(base, lora):
        delta = 3.0 * adapter[f"{site}.lora_B"] @ adapter[f"{site}.lora_A"]
        merged[f"model.{site}.weight"] = base.weights[f"model.{site}.weight"] + delta
    ids = models.random_ids(2, 5)
    network = network_of("llama", lora)
    network.set_adapter({name: t[None] for name, t in adapter.items()})
    other = Network(type(base)("merged", base.config, merged, "none", ""), Submodel.prefix(3), lora)
    close(logits_of(network, ids), logits_of(other, ids))


def test_sites_are_the_targets_of_every_block_and_nothing_else():
    """2 targets x 3 blocks, with their sizes; the head is no target."""
    sites = linear_sites(models.base_of("llama"), LoRAConfig(targets=("k_proj", "down_proj")))
    assert sites == {
        f"layers.{j}.{name}": size
        for j in range(3)
        for name, size in {"self_attn.k_proj": (32, 16), "mlp.down_proj": (48, 32)}.items()
    }
    assert set(network_of("llama").sites) == set(linear_sites(models.base_of("llama"), LORA))


def test_a_network_shares_its_weights_with_the_base():
    """Assigned, not copied: the frozen base lies in memory once."""
    base = models.base_of("mistral")
    network = network_of("mistral")
    site = network.sites["layers.1.mlp.up_proj"]
    assert site.base.weight.data_ptr() == base.weights["model.layers.1.mlp.up_proj.weight"].data_ptr()
    assert not any(p.requires_grad for p in network.model.parameters())
    assert not network.model.training
    assert not any(module.training for module in network.model.modules())


def test_a_checkpoint_that_lacks_a_weight_is_refused():
    base = models.base_of("qwen2")
    name = "model.layers.2.mlp.up_proj.weight"
    fewer = {n: w for n, w in base.weights.items() if n != name}
    with pytest.raises(ValueError, match="lacks"):
        Network(type(base)("torn", base.config, fewer, "none", ""), Submodel.prefix(3), LORA)


@every_architecture
@pytest.mark.parametrize("end", [None, 5])
def test_generation_is_that_of_transformers(architecture: str, end: int | None):
    """Greedy, prompts of different lengths padded on the left, until a token that ends some answers early."""
    network, reference = network_of(architecture), models.reference(architecture)
    ids = models.random_ids(6, 7, seed=2)
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, 3, 1, 0, 5, 2]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    whole = reference.generate(input_ids=ids, attention_mask=mask, eos_token_id=96, **kwargs)[:, 7:]
    stop = 96 if end is None else int(whole[0, 2])
    expected = reference.generate(input_ids=ids, attention_mask=mask, eos_token_id=stop, **kwargs)[:, 7:]
    ours = generate(network, ids, mask, max_new_tokens=8, end=stop, padding=0)
    assert torch.equal(ours[:, : expected.shape[1]], expected)
    assert not ours[:, expected.shape[1] :].any()


def test_the_written_out_gradients_are_right():
    """Central differences in fp64 of the fused norm and rotation."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gain, x = random(6), random(2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rms_norm(t, gain, 1e-6), (x,))
    angle = random(1, 1, 3, 4).repeat(1, 1, 1, 2)
    heads = random(2, 2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rotary(t, angle.cos(), angle.sin()), (heads,))


def test_the_norm_of_three_and_four():
    """rms of (3, 4) is sqrt(12.5): 3 / 3.5355 = 0.8485, times the gain 2; 4 / 3.5355 = 1.1314."""
    module = torch.nn.Module()
    module.weight, module.variance_epsilon = torch.tensor([2.0, 1.0]), 0.0  # type: ignore[assignment]
    torch.testing.assert_close(norm(module, torch.tensor([3.0, 4.0]))[1], torch.tensor([1.69706, 1.13137]))


def test_an_attention_window_shorter_than_the_examples_is_refused(tmp_path):
    """Blocks attend to all earlier tokens, so a Mistral with a window of 16 cannot take examples of 32 tokens."""
    import json
    import shutil

    import pytest

    from fleetune.errors import UserError
    from fleetune.problem import load_inputs
    from support import tiny

    folder = tmp_path / "windowed"
    shutil.copytree(tiny.model_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=16)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="attention window of 16"):
        load_inputs(tiny.spec({"model.base": str(folder)}))
