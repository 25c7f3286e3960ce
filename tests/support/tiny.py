"""A world small enough for a test: a random 4-block Llama of width 32, its tokenizer, word problems, a small fleet."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.spec import RunSpec, from_dict


@functools.cache
def model_folder(num_layers: int = 4) -> str:
    """A saved random Llama (32 wide, 2 heads) with micro-llama's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fleetune.models.folder import ASSETS

    folder = Path(tempfile.mkdtemp(prefix="tiny-llama-"))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "micro-llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@functools.cache
def data_file(num_examples: int = 120) -> str:
    """A JSONL file of short sums in four categories."""
    generator = np.random.default_rng(0)
    path = Path(tempfile.mkdtemp(prefix="tiny-data-")) / "sums.jsonl"
    with path.open("w") as file:
        for _ in range(num_examples):
            a, b = (int(x) for x in generator.integers(1, 10, size=2))
            record = {
                "prompt": f"Q: {a} + {b}\nA:",
                "response": f"#### {a + b}",
                "category": f"c{(a + b) % 4}",
            }
            file.write(json.dumps(record) + "\n")
    return str(path)


SPEC: dict[str, Any] = {
    "name": "tiny",
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "data": {"max_tokens": 32, "num_eval_examples": 8, "partition": {"kind": "dirichlet", "alpha": 1.0}},
    "fleet": {"num_clients": 6, "devices": {"jetson-nano": 0.5, "jetson-agx-orin-64gb": 0.5}},
    "rounds": {"num_rounds": 3, "clients_per_round": 3},
    "local": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
    "evaluation": {"every": 3, "max_new_tokens": 4, "batch_size": 8},
    "execution": {"kind": "serial", "workers": 2, "cohort": 2, "threads": 1, "device": "cpu", "kernels": "torch"},
    "tracking": {"enabled": False},
}

# What each method needs beyond its defaults to run on four blocks and three rounds.
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "c2a": {"units": 3, "code_size": 2, "latent_size": 4},
    "adalora": {"target_rank": 1},
    "devft": {"initial_capacity": 1},
    "split-lora": {"split_point": 2},
    "dofit": {"domains": 2, "step": 0.05},  # a step of 1 is ten times what a tiny tensor moves in training
    "fedadapter": {"width": 2, "width_step": 2, "max_width": 4, "trial_seconds": 1e-3},
    "fedprox": {"mu": 0.1},
    "flora": {"ranks": {"jetson-nano": 1}},
    "fwdllm": {"directions": 2, "h": 0.1, "learning_rate": 0.01},
    "progfed": {"stages": 2},
}


def spec(overrides: Mapping[str, Any] | None = None, *, method: str = "fedit") -> RunSpec:
    """The tiny run, with dotted overrides."""
    values = json.loads(json.dumps(SPEC))
    values["model"]["base"] = model_folder()
    values["data"]["dataset"] = data_file()
    values["method"] = {"name": method, **METHOD_SETTINGS.get(method, {})}
    return from_dict(values, overrides)
