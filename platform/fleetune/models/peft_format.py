"""Adapters in PEFT's own format, which ``PeftModel.from_pretrained`` loads (a test does), and what has no place there in ours.

PEFT's format holds pairs. A third factor goes into B, a dense matrix becomes the pair of its singular vectors. What else an
adapter may be made of (`models.adapters`) is written as it is, with a file that says so; `load_tensors` reads both.
The configuration is written by hand, because importing PEFT takes longer than many a run's last round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fleetune import files
from fleetune.models.adapters import is_pair
from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig
from fleetune.tensors import Tensors, load, save

if TYPE_CHECKING:
    from fleetune.methods.base import GlobalModel


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG = "fleetune_adapter.json"
"""Stands beside the weights if PEFT cannot hold the adapter; names are then those of `models.adapters`."""
PREFIX = "base_model.model.model."
NEGLIGIBLE = 1e-6
"""Singular values below this fraction of the largest are rounding errors of fp32 sums."""


def save_adapter(folder: Path, model: GlobalModel, base: BaseModel, lora: LoRAConfig) -> None:
    """Write an adapter of the full model: in PEFT's format if it is made of pairs, else in our own."""
    assert model.model.submodel.is_whole(base.num_layers), "an adapter is shipped for the whole model"
    folder.mkdir(parents=True, exist_ok=True)
    adapter = as_pairs({**model.adapter, **model.model.held}, scaling=lora.scaling)
    if all(is_pair(name) for name in adapter):
        config, name, tensors = peft_config(adapter, base, lora), CONFIG, to_peft(adapter)
    else:
        config, name, tensors = {"base": base.folder, "lora": lora.model_dump()}, OWN_CONFIG, adapter
    text = (json.dumps(config, indent=2) + "\n").encode()
    files.write(folder / name, text)
    # PEFT's file has no room for a checksum, so the other one holds it (RunDirectory.check).
    metadata = {name: files.checksum(text)}
    save(folder / WEIGHTS, tensors, metadata, lasting=True)


def load_tensors(folder: Path) -> Tensors:
    """The tensors of a folder that `save_adapter` wrote, under our own names: ``layers.0.self_attn.q_proj.lora_A``."""
    tensors, _ = load(folder / WEIGHTS)
    return {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}


def peft_config(adapter: Tensors, base: BaseModel, lora: LoRAConfig) -> dict:
    """The values of adapter_config.json for a pair at each of the adapted sites."""
    ranks = {name.removesuffix(".lora_A"): t.shape[0] for name, t in adapter.items() if name.endswith(".lora_A")}
    others = {site: rank for site, rank in ranks.items() if rank != lora.rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.folder,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.target_names),
        "bias": "none",
        "inference_mode": True,
    }
    blocks = {int(site.split(".")[1]) for site in ranks}
    if len(blocks) < base.num_layers:  # else PEFT would expect a pair in every block
        config["layers_to_transform"] = sorted(blocks)
    if others:  # alpha / r stays what it was in training
        config["rank_pattern"] = {f"model.{site}": rank for site, rank in others.items()}
        config["alpha_pattern"] = {f"model.{site}": lora.scaling * rank for site, rank in others.items()}
    return config


def to_peft(adapter: Tensors) -> Tensors:
    """``layers.0.self_attn.q_proj.lora_A`` -> ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``."""
    return {f"{PREFIX}{name}.weight": tensor for name, tensor in adapter.items()}


def as_pairs(adapter: Tensors, *, scaling: float) -> Tensors:
    """The same adapter with pairs in place of third factors and dense matrices; tensors of other kinds as they are.

    A site with a pair and a dense matrix gets one pair for both: their factors stand side by side, and their ranks add up.
    """
    out = dict(adapter)
    for name in [name for name in adapter if name.endswith(".lora_E")]:
        name_b = name.removesuffix("lora_E") + "lora_B"
        out[name_b] = out[name_b] * out.pop(name)  # B diag(E)
    for name in [name for name in adapter if name.endswith(".delta")]:
        site = name.removesuffix(".delta")
        a, b = factors(out.pop(name), scaling=scaling)
        if f"{site}.lora_A" in out:
            a, b = torch.cat([out[f"{site}.lora_A"], a]), torch.cat([out[f"{site}.lora_B"], b], dim=1)
        out[f"{site}.lora_A"], out[f"{site}.lora_B"] = a, b
    return out


def factors(delta: torch.Tensor, *, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with scaling · B A = delta (out, in), of the least rank r that gives it, and at least 1."""
    u, values, v = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = max(1, int((values > NEGLIGIBLE * values[0]).sum()))
    b = u[:, :rank] * values[:rank] / scaling
    return v[:rank].to(delta.dtype).contiguous(), b.to(delta.dtype).contiguous()
