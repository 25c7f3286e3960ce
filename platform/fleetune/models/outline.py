"""A base model without its weights: names, sizes and types of all tensors, on torch's meta device, which holds no data.

That is enough to know what a server sends and what work costs; nothing can be trained on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fleetune.errors import UserError, unknown_name
from fleetune.models.architectures import ARCHITECTURES, ModelShape, find_architecture
from fleetune.models.base import BaseModel
from fleetune.models.checkpoint import tensor_sizes
from fleetune.models.config import ModelConfig
from fleetune.models.folder import BUILT_IN, find_base, is_cached, is_hub_id
from fleetune.models.load import load_config
from fleetune.models.quantize import is_linear
from fleetune.tensors import Tensors

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256  # weights per 8-bit scale, scales per fp32 scale
NF4_TABLES = ("quant_map", "nested_quant_map", "bitsandbytes__nf4")
"""Last parts of the names of what a quantised matrix has beside its codes and scales, whatever its size."""
# Settings of a quantised matrix as bitsandbytes writes them in JSON; their length differs by the digits of one number.
NF4_STATE_BYTES = 170


def outline_base(config: ModelConfig) -> BaseModel:
    """The outline of a built-in model, a folder, an architecture's name (``llama2-7b``) or the hub id it was published under."""
    shape = published_shape(config.base)
    values = load_config(config) if shape is None else hf_values(shape)
    weights = meta_weights(ModelShape.from_values(values), config.quantization)
    return BaseModel(config.base, values, weights, config.quantization, find_base(config.base) if shape is None else "")


def base_of(shape: ModelShape, weights: Tensors | None = None, quantization: str = "none") -> BaseModel:
    """A base model of an architecture. Without ``weights`` it answers for sizes alone."""
    return BaseModel(shape.name, hf_values(shape), weights or {}, quantization, "")


def published_shape(name: str) -> ModelShape | None:
    """The architecture of that name, or published under that hub id; None for a model whose config.json is on this machine.

    Raises UserError if the name is neither.
    """
    if name in BUILT_IN or Path(name).expanduser().is_dir():
        return None
    if (shape := find_architecture(name)) is not None:
        return shape
    if is_hub_id(name):
        if is_cached(name):
            return None
        raise UserError(
            "a plan reads nothing from the hub, and this is none of the architectures that ship",
            field="model.base",
            value=name,
            hint=f"download it and give the folder, or name one of: {', '.join(ARCHITECTURES)}",
        )
    raise unknown_name("model", name, [*BUILT_IN, *ARCHITECTURES], field="model.base")


def hf_values(shape: ModelShape) -> dict[str, Any]:
    """The architecture as the values of a config.json, from which `ModelShape.from_values` gives the same architecture."""
    has_only_qkv_bias = shape.qkv_bias and not shape.out_bias
    return {
        "_name_or_path": shape.name,
        "model_type": "qwen3" if shape.qk_norm else "qwen2" if has_only_qkv_bias else "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": shape.out_bias,
        "mlp_bias": shape.mlp_bias,
        "max_position_embeddings": shape.max_positions,
        # These two decide numbers and no sizes, so that any values do.
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }


def meta_weights(shape: ModelShape, quantization: str = "none") -> Tensors:
    """Every tensor of the base without data, by the names, sizes and types that `models.load.load_base` gives."""
    out: Tensors = {}
    for name, size in tensor_sizes(shape).items():
        out.update(_meta_linear(name, size[1], size[0], quantization) if is_linear(name) else {name: empty(*size)})
    return out


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor with a size and a type, and no data."""
    return torch.empty(*sizes, dtype=dtype, device="meta")


def _meta_linear(name: str, num_in: int, num_out: int, quantization: str) -> Tensors:
    """A block's matrix (out, in) as `models.quantize` stores it.

    nf4 (Dettmers et al. 2023, arXiv 2305.14314) packs two codes into a byte, with an 8-bit scale per 64 weights, and an fp32
    scale per 256 of these.
    """
    if quantization == "none":
        return {name: empty(num_out, num_in)}
    if quantization == "int8":
        return {name: empty(num_out, num_in, dtype=torch.int8), f"{name}.SCB": empty(num_out)}
    scales = -(-num_in * num_out // NF4_BLOCK)
    return {
        name: empty(num_in * num_out // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": empty(scales, dtype=torch.uint8),
        f"{name}.quant_map": empty(16),
        f"{name}.nested_absmax": empty(-(-scales // NF4_NESTED_BLOCK)),
        f"{name}.nested_quant_map": empty(256),
        f"{name}.quant_state.bitsandbytes__nf4": empty(NF4_STATE_BYTES, dtype=torch.uint8),
    }
