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
from fleetune.models.peft_format import save_adapter
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


@pytest.mark.parametrize("method", ["fedit", "devft", "split-lora", "fedsa-lora"])
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
