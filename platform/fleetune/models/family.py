"""Decides which configurations the decoder computes as transformers does: every field that changes the arithmetic, by name.

A field is read and checked here, or is known to change nothing. For any other field the decoder is compared with transformers'
own model (`models.verify`), so that an unknown switch is refused and not ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fleetune.errors import UserError
from fleetune.models.folder import refusal

# Decoders that run as embed -> blocks(h, position embeddings) -> norm -> head, checked against their own forward
# by tests/models/test_network.py.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")

# Rotary embeddings whose frequencies do not change within a model's positions (longrope's depend on the length of each text),
# and the fields that transformers reads for each.
ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
ROPE_TYPES = tuple(ROPE_FIELDS)
# Of every type; transformers itself ignores the fields of another type.
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}.union(*ROPE_FIELDS.values())

COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Far above any model's sizes: a larger number is a slip, and would use up the memory before anyone noticed.
MOST, MOST_LAYERS, MOST_HEAD_DIM = 1 << 31, 10_000, 1 << 16
# The fields that are read from a configuration.
SIZES = {
    *COUNTS,
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
}
# Read and checked by `check_config`, beside SIZES.
CHECKED = {
    "model_type",
    "hidden_act",
    "attention_dropout",
    "mlp_bias",
    "quantization_config",
    "transformers_weights",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}
# Where a model came from, how it was initialised, and what generation with other programs does: no arithmetic.
HARMLESS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "pad_token_id",
    "pretraining_tp",  # how products were split in training; transformers no longer reads it
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def unknown_fields(values: Mapping[str, Any]) -> list[str]:
    """The fields of a config.json whose effect is not known here."""
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    nested = [f"rope_parameters.{key}" for key in rope if key not in ROPE_COMMON] if isinstance(rope, dict) else []
    return sorted(values.keys() - SIZES - CHECKED - HARMLESS) + nested


def check_stored(values: Mapping[str, Any], name: str) -> None:
    """Raises UserError if a config.json names a family, or a storage of weights, that is not supported."""
    if values.get("model_type") not in ARCHITECTURES:
        rule = f"architecture {values.get('model_type')!r} is not supported"
        raise refusal(name, rule, f"supported: {', '.join(ARCHITECTURES)}")
    stored = values.get("quantization_config") or values.get("compression_config")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else None
        rule = f"its weights are stored quantised (quantization_config: {method or 'unnamed'}), which is not read"
        raise refusal(
            name, rule, "name the model that it was made from; model.quantization: nf4 or int8 quantises that"
        )
    if values.get("transformers_weights"):
        raise refusal(name, "config.json names a weights file of its own (transformers_weights), which is not read")


def check_config(values: Mapping[str, Any], name: str) -> None:
    """Raises UserError if a complete configuration asks for other arithmetic than the decoder's, or makes no sense."""

    def must(holds: bool, field: str, rule: str) -> None:
        if not holds:
            raise _unsupported(name, field, values.get(field), rule)

    for field in COUNTS:
        most = MOST_LAYERS if field == "num_hidden_layers" else MOST
        must(_is_count(values.get(field), most), field, f"must be a whole number from 1 to {most}")
    heads, groups, head_dim = values["num_attention_heads"], values["num_key_value_heads"], values.get("head_dim")
    must(heads % groups == 0, "num_key_value_heads", f"must divide the {heads} attention heads")
    if head_dim is None:
        must(values["hidden_size"] % heads == 0, "hidden_size", f"must be a multiple of the {heads} attention heads")
        head_dim = values["hidden_size"] // heads
    must(
        _is_count(head_dim, MOST_HEAD_DIM) and head_dim % 2 == 0, "head_dim", f"must be even, from 2 to {MOST_HEAD_DIM}"
    )
    eps: Any = values.get("rms_norm_eps")
    must(_is_number(eps) and 0 <= eps < 1, "rms_norm_eps", "must be a number from 0 to 1")
    must(values.get("hidden_act") in ("silu", "swish"), "hidden_act", "only silu is supported")
    must(not values.get("attention_dropout"), "attention_dropout", "only 0 is supported")
    for field in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        must(values.get(field) in (None, False, True), field, "must be true or false")
    must(values.get("is_causal") in (None, True), "is_causal", "only causal attention is supported")
    kinds, known = values.get("layer_types") or [], ("full_attention", "sliding_attention")
    must(
        isinstance(kinds, list) and all(k in known for k in kinds),
        "layer_types",
        f"only {', '.join(known)} are supported",
    )
    _check_rope(values.get("rope_parameters"), name)


def attention_window(values: Mapping[str, Any]) -> int | None:
    """Number of tokens that the narrowest block sees, its own included; None if all blocks see every token before."""
    window = values.get("sliding_window")
    if not window:
        return None
    if values["model_type"] == "mistral":
        return int(window)
    if values["model_type"] not in ("qwen2", "qwen3") or not values.get("use_sliding_window"):
        return None
    return int(window) if "sliding_attention" in (values.get("layer_types") or ["sliding_attention"]) else None


def _check_rope(rope: Any, name: str) -> None:
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if kind not in ROPE_TYPES:
        shown = repr(kind) if isinstance(kind, str) else "no name"
        rule = f"rotary embeddings of type {shown} are not supported"
        raise refusal(name, rule, f"supported: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        rule = "only heads that are rotated as a whole are supported"
        raise _unsupported(name, "partial_rotary_factor", rope["partial_rotary_factor"], rule)
    theta = rope.get("rope_theta")
    if not _is_number(theta) or theta <= 0:
        raise _unsupported(name, "rope_theta", theta, "must be a number above 0")


def _unsupported(name: str, field: str, value: Any, rule: str) -> UserError:
    return refusal(name, f"config.json says {field}: {str(value)[:40]}, but {rule}", "name another model")


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
