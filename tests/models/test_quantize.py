"""Quantised storage: codes that stand for nearly the same matrix, and layers that compute with it."""

from __future__ import annotations

import pytest
import torch

from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig
from fleetune.models.network import Network
from fleetune.models.quantize import dequantize, is_linear, quantize, quantize_linears
from fleetune.models.submodel import Submodel
from fleetune.problem import base_from_arrays, base_to_arrays
from support import random_models as models

LORA = LoRAConfig(rank=2)
NAME = "model.layers.1.mlp.up_proj.weight"
KINDS = ["nf4", "int8"]


def test_only_the_matrices_of_blocks_are_quantised():
    assert is_linear("model.layers.0.self_attn.q_proj.weight")
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
    ):
        assert not is_linear(name)
    plain = models.base_of("qwen2").weights
    for name, weight in quantize_linears(plain, "nf4").items():
        assert name not in plain or is_linear(name) or weight is plain[name]


def test_int8_rows_are_scaled_by_their_largest_entry():
    """Row (1, -0.5) has scale 1 / 127: codes 127 and -64 (63.5 rounds to even), which stand for 1 and -0.504."""
    weights = quantize(NAME, torch.tensor([[1.0, -0.5], [0.0, 4.0]]), "int8")
    assert weights[NAME].tolist() == [[127, -64], [0, 127]]
    torch.testing.assert_close(dequantize(weights, NAME, "int8"), torch.tensor([[1.0, -64 / 127], [0.0, 4.0]]))


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.155), ("int8", 0.5 / 127 + 1e-3)])
def test_the_error_is_at_most_half_a_step(kind: str, most: float):
    """int8: half of absmax / 127 by row (and fp16's rounding); nf4: half of its widest gap, 0.304 of a block's absmax."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    error = (dequantize(quantize(NAME, weight, kind), NAME, kind) - weight).abs()
    assert (error.amax(1) <= most * weight.abs().amax(1)).all()
    assert error.max() > 0


@pytest.mark.parametrize(("kind", "bytes_per_element"), [("nf4", 0.5), ("int8", 1.0)])
def test_what_the_codes_weigh(kind: str, bytes_per_element: float):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    assert quantize(NAME, weight, kind)[NAME].nbytes == bytes_per_element * weight.numel()


def dequantised(base: BaseModel) -> BaseModel:
    weights = {
        name: dequantize(base.weights, name, base.quantization)
        for name in base.weights
        if name.endswith((".weight", ".bias"))
    }
    return BaseModel("plain", base.config, weights, "none", base.folder)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_an_nf4_network_computes_with_what_its_codes_stand_for(architecture: str):
    """Products are in fp32, so forward and backward agree to rounding with a network of the dequantised weights."""
    base = models.base_of(architecture, "nf4")
    adapter = {name: t[None] for name, t in models.random_adapter(base, LORA).items()}
    weights = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    outputs = []
    for b in (base, dequantised(base)):
        network = Network(b, Submodel.prefix(base.num_layers), LORA)
        network.set_adapter(adapter)
        h = network.embed(models.random_ids(2, 6)).detach().requires_grad_()
        out = network.blocks(h)
        (out * weights).sum().backward()
        assert h.grad is not None
        outputs.append((out.detach(), h.grad))
    for ours, plain in zip(*outputs, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_int8_layer_computes_with_what_its_codes_stand_for(architecture: str):
    """LLM.int8() rounds the input to 8 bits by row, so the output is within 1 %; the gradient meets fp16 alone: 0.1 %."""
    base = models.base_of(architecture, "int8")
    whole = Submodel.prefix(base.num_layers)
    quantised, plain = Network(base, whole, LORA), Network(dequantised(base), whole, LORA)
    generator = torch.Generator().manual_seed(2)
    for name in quantised.sites:
        results = []
        num_out, num_in = plain.sites[name].base.weight.shape
        x, g = torch.randn(2, 5, num_in, generator=generator), torch.randn(2, 5, num_out, generator=generator)
        for network in (quantised, plain):
            leaf = x.clone().requires_grad_()
            y = network.sites[name](leaf)
            y.backward(g)
            assert leaf.grad is not None
            results.append((y.detach(), leaf.grad))
        (y, dx), (y_plain, dx_plain) = results
        assert (y - y_plain).norm() <= 1e-2 * y_plain.norm(), name
        assert (dx - dx_plain).norm() <= 1e-3 * dx_plain.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_can_be_shared(kind: str):
    """Through NumPy arrays, as the object store maps them, and back: the same bits."""
    base = models.base_of("llama", kind)
    back = base_from_arrays(base_to_arrays(base))
    assert back.weights.keys() == base.weights.keys()
    assert all(torch.equal(back.weights[name], weight) for name, weight in base.weights.items())
    assert (back.quantization, back.config) == (kind, base.config)
