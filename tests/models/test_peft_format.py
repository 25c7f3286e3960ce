"""What a run ships is an adapter that PEFT loads, and it computes what we computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fleetune.methods.base import GlobalModel
from fleetune.models.config import LoRAConfig
from fleetune.models.model import Model
from fleetune.models.network import Network
from fleetune.models.peft_format import as_pairs, factors, load_tensors, save_adapter
from fleetune.models.submodel import Submodel
from support import random_models as models
from support import runs, tiny

CASES = {"all-linear": LoRAConfig(rank=3, alpha=5.0), "q and v": LoRAConfig(rank=2, targets=("q_proj", "v_proj"))}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_our_logits(architecture: str, case: str, tmp_path: Path):
    from peft import PeftModel

    lora, base = CASES[case], models.base_of(architecture)
    adapter = models.random_adapter(base, lora)
    whole = Submodel.prefix(base.num_layers)
    save_adapter(tmp_path, GlobalModel(Model(whole), adapter), base, lora)
    peft = PeftModel.from_pretrained(models.reference(architecture), str(tmp_path)).eval()

    ids = models.random_ids(2, 9)
    network = Network(base, whole, lora)
    network.set_adapter({name: t[None] for name, t in adapter.items()})
    ours = network.logits(network.blocks(network.embed(ids)))
    torch.testing.assert_close(peft(ids).logits, ours, rtol=1e-5, atol=3e-5)
    plain = models.reference(architecture)(ids).logits
    assert not torch.allclose(plain, ours, atol=1e-2)


def test_third_factors_and_dense_matrices_become_pairs():
    """scaling 2. B diag(E) = (1 2) diag(3, 4) = (3 8). D = (6 0; 0 0) = 2 B A has rank 1, and a site with both gets both."""
    adapter = {
        "q.lora_A": torch.eye(2),
        "q.lora_B": torch.tensor([[1.0, 2.0]]),
        "q.lora_E": torch.tensor([3.0, 4.0]),
        "k.delta": torch.tensor([[6.0, 0.0], [0.0, 0.0]]),
        "v.lora_A": torch.tensor([[1.0, 1.0]]),
        "v.lora_B": torch.tensor([[1.0], [2.0]]),
        "v.delta": torch.tensor([[0.0, 0.0], [0.0, 8.0]]),
    }
    pairs = as_pairs(adapter, scaling=2.0)
    assert {name: tuple(t.shape) for name, t in pairs.items()} == {
        "q.lora_A": (2, 2), "q.lora_B": (1, 2),
        "k.lora_A": (1, 2), "k.lora_B": (2, 1),
        "v.lora_A": (2, 2), "v.lora_B": (2, 2),
    }  # fmt: skip
    assert pairs["q.lora_B"].tolist() == [[3.0, 8.0]]
    product = {site: 2 * pairs[f"{site}.lora_B"] @ pairs[f"{site}.lora_A"] for site in "kv"}
    torch.testing.assert_close(product["k"], adapter["k.delta"])
    torch.testing.assert_close(product["v"], torch.tensor([[2.0, 2.0], [4.0, 12.0]]))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_dense_matrix_takes_the_rank_that_it_has(rank: int):
    """A matrix of zeros takes rank 1, because PEFT has no pair of rank 0."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(7, rank, generator=generator) @ torch.randn(rank, 5, generator=generator)
    a, b = factors(delta, scaling=0.5)
    assert (a.shape, b.shape) == ((max(rank, 1), 5), (7, max(rank, 1)))
    torch.testing.assert_close(0.5 * b @ a, delta, rtol=1e-5, atol=1e-5)


def test_peft_computes_our_logits_with_mixed_ranks(tmp_path: Path):
    """Pairs of rank 3, some of them with a third factor, one dense matrix alone, and one beside a pair: ranks 3, 2 and 5."""
    from peft import PeftModel

    lora, base = CASES["all-linear"], models.base_of("llama")
    generator = torch.Generator().manual_seed(1)
    adapter = models.random_adapter(base, lora)
    for layer in range(base.num_layers):
        adapter[f"layers.{layer}.mlp.up_proj.lora_E"] = torch.randn(lora.rank, generator=generator)
    alone, beside = "layers.1.self_attn.q_proj", "layers.2.mlp.down_proj"
    held = {}
    for site, (num_out, num_in) in {alone: (32, 32), beside: (32, 48)}.items():
        b, a = torch.randn(num_out, 2, generator=generator), torch.randn(2, num_in, generator=generator)
        held[f"{site}.delta"] = 0.1 * b @ a
    del adapter[f"{alone}.lora_A"], adapter[f"{alone}.lora_B"]
    whole = Submodel.prefix(base.num_layers)
    save_adapter(tmp_path, GlobalModel(Model(whole, held), adapter), base, lora)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {f"model.{beside}": 5, f"model.{alone}": 2}
    assert {site: alpha / config["rank_pattern"][site] for site, alpha in config["alpha_pattern"].items()} == (
        pytest.approx(dict.fromkeys(config["rank_pattern"], lora.scaling))
    )

    network = Network(base, whole, lora)
    network.set_adapter({name: t[None] for name, t in adapter.items()})
    network.hold(held)
    ids = models.random_ids(2, 9)
    ours = network.logits(network.blocks(network.embed(ids)))
    peft = PeftModel.from_pretrained(models.reference("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(peft(ids).logits, ours, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("kind", ["pairs", "bottlenecks"])
def test_what_was_written_is_read_under_our_own_names(kind: str, tmp_path: Path):
    """PEFT's format has its own names; what it cannot hold is written under ours, with a file that says so."""
    lora, base = CASES["all-linear"], models.base_of("llama")
    adapter = models.random_adapter(base, lora)
    if kind == "bottlenecks":
        adapter["layers.1.mlp.bottleneck_down"] = torch.ones(4, 32)
        adapter["layers.1.mlp.bottleneck_up"] = torch.ones(32, 4)
    save_adapter(tmp_path, GlobalModel(Model(Submodel.prefix(base.num_layers)), adapter), base, lora)
    runs.same_tensors(dict(sorted(load_tensors(tmp_path).items())), dict(sorted(adapter.items())))
    config = "adapter_config.json" if kind == "pairs" else "fleetune_adapter.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([config, "adapter_model.safetensors"])


@pytest.mark.parametrize("method", ["fedit", "devft", "split-lora", "fedsa-lora", "dofit", "progfed", "adalora"])
def test_a_finished_run_leaves_an_adapter_that_loads(method: str):
    """Every tensor of the file has its place in the model, and none is missing."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    done = runs.run(tiny.spec({"evaluation.generate": False}, method=method))
    folder = done.run_dir.path / "adapter"
    stored = load_file(folder / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny.model_folder(), dtype=torch.float32)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, str(folder)))
    runs.same_tensors(dict(sorted(loaded.items())), dict(sorted(stored.items())))
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2


def test_part_of_the_model_is_not_shipped(tmp_path: Path):
    base = models.base_of("llama")
    with pytest.raises(AssertionError, match="whole model"):
        save_adapter(tmp_path, GlobalModel(Model(Submodel.prefix(2)), {}), base, LoRAConfig())
