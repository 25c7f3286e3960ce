"""Tiny random models of every architecture that is supported, and their own transformers forward as the reference."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch

from fleetune.models.base import BaseModel, load_base
from fleetune.models.config import LoRAConfig, ModelConfig
from fleetune.models.network import linear_sites
from fleetune.tensors import Tensors

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 8},
}


@functools.cache
def folder_of(architecture: str) -> str:
    """A saved random model with grouped-query attention (4 heads, 2 for keys and values), gains and biases not trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SIZES, **EXTRA[architecture]})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(5.0)  # HF's initial 0.02 leaves attention nearly uniform, and mistakes unseen
    folder = tempfile.mkdtemp(prefix=f"tiny-{architecture}-")
    model.save_pretrained(folder)
    return folder


@functools.cache
def base_of(architecture: str, quantization: str = "none") -> BaseModel:
    """The model as the project loads it."""
    return load_base(ModelConfig(base=folder_of(architecture), quantization=quantization))


def reference(architecture: str) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder_of(architecture), dtype=torch.float32).eval()


def random_adapter(base: BaseModel, lora: LoRAConfig, *, seed: int = 0) -> Tensors:
    """An adapter whose B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    out: Tensors = {}
    for site, (num_in, num_out) in linear_sites(base, lora).items():
        out[f"{site}.lora_A"] = 0.3 * torch.randn(lora.rank, num_in, generator=generator)
        out[f"{site}.lora_B"] = 0.3 * torch.randn(num_out, lora.rank, generator=generator)
    return out


def random_ids(num_examples: int, num_tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids (num_examples, num_tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SIZES["vocab_size"], (num_examples, num_tokens), generator=generator)
