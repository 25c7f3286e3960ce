"""A base model without its weights: sizes, names and types of all tensors, on torch's meta device, which holds no data.

Enough for what a server sends and for what it costs; nothing can be trained on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fleetune.cost.shapes import ARCHITECTURES, ModelShape
from fleetune.errors import UserError, unknown_name
from fleetune.models import base as models
from fleetune.models.base import BaseModel, find_base, load_config
from fleetune.models.config import ModelConfig
from fleetune.tensors import Tensors

# What must stand in a config.json for it to be read without transformers, which knows each family's defaults.
COMPLETE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
    "max_position_embeddings",
)

# Settings of a quantised matrix as bitsandbytes writes them in JSON; their length differs by the digits of one number.
NF4_STATE_BYTES = 170


def outline_base(config: ModelConfig) -> BaseModel:
    """The outline of a built-in model, a folder, an architecture's name (``llama2-7b``) or the hub id it was published under."""
    shape = published_shape(config.base)
    values = _folder_config(config) if shape is None else hf_values(shape)
    weights = meta_weights(ModelShape.from_values(values), config.quantization)
    return BaseModel(config.base, values, weights, config.quantization, find_base(config.base) if shape is None else "")


def published_shape(name: str) -> ModelShape | None:
    """The architecture of that name, or published under that hub id; None for a built-in model or a folder."""
    if name in models.BUILT_IN or Path(name).expanduser().is_dir():
        return None
    for shape in ARCHITECTURES.values():
        if name == shape.name or shape.source == f"config.json of {name}":
            return shape
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        raise UserError(
            "a plan reads nothing from the hub, and this is none of the architectures that ship",
            field="model.base",
            value=name,
            hint=f"download it and give the folder, or name one of: {', '.join(ARCHITECTURES)}",
        )
    raise unknown_name("model", name, [*models.BUILT_IN, *ARCHITECTURES], field="model.base")


def hf_values(shape: ModelShape) -> dict[str, Any]:
    """The architecture as the values of a config.json."""
    return {
        "_name_or_path": shape.name,
        "model_type": "qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias else "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied_embeddings,
        "max_position_embeddings": shape.max_positions,
    }


def _folder_config(config: ModelConfig) -> dict[str, Any]:
    path = Path(find_base(config.base)) / "config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if values.get("model_type") == "llama" and all(name in values for name in COMPLETE):
        return values
    return load_config(config)


def meta_weights(shape: ModelShape, quantization: str = "none") -> Tensors:
    """Every tensor of the base without data, as `models.base.load_base` holds it."""

    h = shape.hidden_size
    out: Tensors = {"model.embed_tokens.weight": empty(shape.vocab_size, h), "model.norm.weight": empty(h)}
    if not shape.tied_embeddings:
        out["lm_head.weight"] = empty(shape.vocab_size, h)
    for layer in range(shape.num_layers):
        start = f"model.layers.{layer}."
        for name, (num_in, num_out) in shape.linears.items():
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            out.update(_meta_linear(f"{start}{part}.{name}.weight", num_in, num_out, quantization))
            if shape.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
                out[f"{start}{part}.{name}.bias"] = empty(num_out)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{start}{norm}.weight"] = empty(h)
        for norm in ("q_norm", "k_norm") if shape.qk_norm else ():
            out[f"{start}self_attn.{norm}.weight"] = empty(shape.head_dim)
    return out


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that has a size and a type alone."""
    return torch.empty(*sizes, dtype=dtype, device="meta")


def _meta_linear(name: str, num_in: int, num_out: int, quantization: str) -> Tensors:
    """A block's matrix as `models.quantize` stores it: nf4 in halves of bytes, an 8-bit scale per 64 and an fp32 one per 256."""
    if quantization == "none":
        return {name: empty(num_out, num_in)}
    if quantization == "int8":
        return {name: empty(num_out, num_in, dtype=torch.int8), f"{name}.SCB": empty(num_out)}
    scales = -(-num_in * num_out // 64)
    return {
        name: empty(num_in * num_out // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": empty(scales, dtype=torch.uint8),
        f"{name}.quant_map": empty(16),
        f"{name}.nested_absmax": empty(-(-scales // 256)),
        f"{name}.nested_quant_map": empty(256),
        f"{name}.quant_state.bitsandbytes__nf4": empty(NF4_STATE_BYTES, dtype=torch.uint8),
    }
