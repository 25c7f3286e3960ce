"""A world small enough for a check of a few seconds: a random 4-block Llama, its tokenizer, short sums, a small fleet.

It is made on the spot and needs no network.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.spec import RunSpec, from_dict


def _folder(prefix: str) -> Path:
    """A temporary folder that is there as long as this process."""
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def model_folder(num_layers: int = 4) -> str:
    """A saved random Llama (32 wide, 2 heads) with micro-llama's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fleetune.models.folder import ASSETS

    folder = _folder("tiny-llama-")
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
    path = _folder("tiny-data-") / "sums.jsonl"
    with path.open("w") as file:
        for _ in range(num_examples):
            a, b = (int(x) for x in generator.integers(1, 10, size=2))
            record = {
                "prompt": f"Q: {a} + {b}\nA:",
                "response": f"#### {a + b}",
                "category": f"c{(a + b) % 4}",
                "reference": f"{b} + {a}",
            }
            file.write(json.dumps(record) + "\n")
    return str(path)


@functools.cache
def library_folder(
    ranks: tuple[int, ...] = (2, 3, 2), num_layers: int = 4, seed: int = 0, width: int = 32, inner: int = 48
) -> str:
    """A library of random adapters ``skill-0``, ``skill-1``, … for `model_folder`, one of each rank, in PEFT's format.

    ``width``, ``inner``: of another model whose attention has as many keys as queries.
    """
    import torch
    from safetensors.torch import save_file

    from fleetune.models.peft_format import CONFIG, WEIGHTS, to_peft

    sizes = {"self_attn": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))}
    sizes["mlp"] = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    sites = {
        f"layers.{n}.{part}.{name}": size
        for n in range(num_layers)
        for part, names in sizes.items()
        for name, size in names.items()
    }
    library = _folder("tiny-library-")
    for i, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        tensors = {}
        for site, (num_in, num_out) in sites.items():
            tensors[f"{site}.lora_A"] = torch.randn(rank, num_in, generator=generator) / num_in**0.5
            tensors[f"{site}.lora_B"] = 0.3 * torch.randn(num_out, rank, generator=generator)
        folder = library / f"skill-{i}"
        folder.mkdir()
        save_file(to_peft(tensors), folder / WEIGHTS)
        names = sorted({site.rpartition(".")[2] for site in sites})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
        (folder / CONFIG).write_text(json.dumps(config))
    return str(library)


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


def spec(method: str, settings: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """The tiny run of a method with its settings, and dotted overrides of the job."""
    values = json.loads(json.dumps(SPEC))
    values["model"]["base"] = model_folder()
    values["data"]["dataset"] = data_file()
    values["method"] = {"name": method, **(settings or {})}
    return from_dict(values, overrides)
