"""Tiny random models of every architecture that is supported, and their own transformers forward as the reference."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig, ModelConfig
from fleetune.models.load import load_base
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
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix=f"tiny-{architecture}-")
    _random_model(architecture, {**SIZES, **EXTRA[architecture]}).save_pretrained(folder)
    return folder


def _random_model(architecture: str, values: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(5.0)  # HF's initial 0.02 leaves attention nearly uniform, and mistakes unseen
    return model


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


def random_folder(architecture: str, seed: int, folder: Path) -> Path:
    """A random model of a random configuration: heads, sizes, biases, tied head, epsilon, rotary embeddings, one file or many."""
    draw = random.Random(f"{architecture} {seed}")
    groups = draw.choice([1, 2, 3])
    values = {
        "vocab_size": SIZES["vocab_size"],
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw.choice([1, 2]),
        "head_dim": draw.choice([4, 6, 16]),
        "hidden_size": 12 * draw.choice([2, 3]),
        "intermediate_size": draw.choice([10, 48]),
        "num_hidden_layers": draw.choice([1, 2]),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 0.1]),
        "tie_word_embeddings": draw.choice([False, True]),
        "attention_bias": draw.choice([False, True]),
        "mlp_bias": draw.choice([False, True]),
        "rope_parameters": {"rope_theta": draw.choice([100.0, 1e4, 1e6]), **draw.choice(ROPES)},
        "sliding_window": draw.choice([None, 32]),
        "use_sliding_window": draw.choice([False, True]),
        "max_window_layers": 1,
    }
    torch.manual_seed(seed)
    model = _random_model(architecture, values)
    model.save_pretrained(folder, max_shard_size=draw.choice(["10KB", "1GB"]))
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
