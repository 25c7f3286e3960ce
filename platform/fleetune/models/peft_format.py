"""Adapters in PEFT's own format, which ``PeftModel.from_pretrained`` loads (a test does).

The configuration is written by hand, because importing PEFT takes longer than many a run's last round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune import files
from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig
from fleetune.tensors import Tensors, save

if TYPE_CHECKING:
    from fleetune.methods.base import GlobalModel


CONFIG = "adapter_config.json"


def save_adapter(folder: Path, model: GlobalModel, base: BaseModel, lora: LoRAConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors for an adapter of the full model."""
    assert model.submodel.is_whole(base.num_layers), "an adapter is shipped for the whole model"
    folder.mkdir(parents=True, exist_ok=True)
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
    text = (json.dumps(config, indent=2) + "\n").encode()
    files.write(folder / CONFIG, text)
    # PEFT's file has no room for a checksum, so the other one holds it (RunDirectory.check).
    metadata = {CONFIG: files.checksum(text)}
    save(folder / "adapter_model.safetensors", to_peft(model.adapter), metadata, lasting=True)


def to_peft(adapter: Tensors) -> Tensors:
    """``layers.0.self_attn.q_proj.lora_A`` -> ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``."""
    return {f"base_model.model.model.{name}.weight": tensor for name, tensor in adapter.items()}
