"""Submodels: selections and combinations of blocks, their weights shared where nothing is combined."""

from __future__ import annotations

import json

import pytest
import torch

from fleetune.models.config import LoRAConfig
from fleetune.models.network import Network
from fleetune.models.quantize import dequantize
from fleetune.models.submodel import Submodel, combined
from support import random_models as models

LORA = LoRAConfig(rank=2)
NAME = "mlp.gate_proj.weight"


def test_a_prefix_is_the_first_blocks_as_they_are():
    assert Submodel.prefix(2).layers == (((0, 1.0),), ((1, 1.0),))
    assert Submodel.prefix(3).is_whole(3)
    assert not Submodel.prefix(2).is_whole(3)
    assert not Submodel.select([0, 2, 1]).is_whole(3)


def test_it_survives_json():
    submodel = Submodel((((0, 0.8), (2, 0.1), (3, 0.1)), ((1, 1.0),)))
    assert Submodel.from_values(json.loads(json.dumps(submodel.to_values()))) == submodel
    assert hash(Submodel.from_values(submodel.to_values())) == hash(submodel)


def test_combined_numbers():
    """0.5 * 2 + 0.25 * 4 - 1 * 1 = 1; one part of weight 1 is itself."""
    parts = [torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([1.0])]
    assert combined(parts, [0.5, 0.25, -1.0]).tolist() == [1.0]
    assert [p.item() for p in parts] == [2.0, 4.0, 1.0]
    assert combined(parts[:1], [1.0]) is parts[0]


def test_selected_blocks_share_the_bases_memory():
    base = models.base_of("llama")
    weights = Submodel.select([2, 0]).weights(base)
    for position, layer in enumerate((2, 0)):
        ours, theirs = weights[f"model.layers.{position}.{NAME}"], base.weights[f"model.layers.{layer}.{NAME}"]
        assert ours.data_ptr() == theirs.data_ptr()
    assert f"model.layers.2.{NAME}" not in weights
    assert weights["model.embed_tokens.weight"] is base.weights["model.embed_tokens.weight"]


def test_fused_blocks_are_the_combination_of_weights_and_adapters():
    """Block 0 of the submodel is 0.9 theta_0 + 0.1 theta_2; the base keeps its bits."""
    base = models.base_of("llama")
    before = {n: w.clone() for n, w in base.weights.items()}
    submodel = Submodel((((0, 0.9), (2, 0.1)), ((1, 1.0),)))
    weights = submodel.weights(base)
    for suffix in (NAME, "input_layernorm.weight"):
        parts = [base.weights[f"model.layers.{j}.{suffix}"] for j in (0, 2)]
        torch.testing.assert_close(weights[f"model.layers.0.{suffix}"], 0.9 * parts[0] + 0.1 * parts[1])
    adapter = models.random_adapter(base, LORA)
    fused = submodel.fuse_adapter(adapter)
    site = "mlp.up_proj.lora_B"
    expected = 0.9 * adapter[f"layers.0.{site}"] + 0.1 * adapter[f"layers.2.{site}"]
    torch.testing.assert_close(fused[f"layers.0.{site}"], expected)
    assert fused[f"layers.1.{site}"] is adapter[f"layers.1.{site}"]
    assert {name.split(".")[1] for name in fused} == {"0", "1"}
    assert all(torch.equal(base.weights[n], w) for n, w in before.items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_blocks_are_fused_after_dequantising(kind: str):
    """The fusion of what the codes stand for, quantised again: off by no more than quantising that fusion is."""
    base = models.base_of("llama", kind)
    submodel = Submodel((((0, 0.9), (2, 0.1)), ((1, 1.0),)))
    weights = submodel.weights(base)
    parts = [dequantize(base.weights, f"model.layers.{j}.{NAME}", kind) for j in (0, 2)]
    fused = 0.9 * parts[0] + 0.1 * parts[1]
    ours = dequantize(weights, f"model.layers.0.{NAME}", kind)
    step = fused.abs().max() * {"nf4": 0.2, "int8": 0.01}[kind]  # the widest gap between two codes is 0.3 of the absmax
    assert (ours - fused).abs().max() < step
    norm = "input_layernorm.weight"
    gains = [base.weights[f"model.layers.{j}.{norm}"] for j in (0, 2)]
    torch.testing.assert_close(weights[f"model.layers.0.{norm}"], 0.9 * gains[0] + 0.1 * gains[1])
    assert weights[f"model.layers.1.{NAME}"] is base.weights[f"model.layers.1.{NAME}"]
    network = Network(base, submodel, LORA)
    ids = models.random_ids(2, 5)
    assert torch.isfinite(network.logits(network.blocks(network.embed(ids)))).all()


def test_a_network_of_a_submodel_runs_its_blocks_in_order():
    """Blocks (2, 0) of the base, run by hand on the whole network."""
    base = models.base_of("llama")
    whole, part = Network(base, Submodel.prefix(3), LORA), Network(base, Submodel.select([2, 0]), LORA)
    h = whole.embed(models.random_ids(2, 5))
    by_hand = whole.blocks(whole.blocks(h, 2, 3), 0, 1)
    assert part.num_layers == 2
    torch.testing.assert_close(part.blocks(h), by_hand, rtol=0, atol=0)
