"""Configurations of other people's models: computed as transformers computes them, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetune.errors import UserError
from fleetune.models.config import ModelConfig
from fleetune.models.family import attention_window
from fleetune.models.load import load_config
from fleetune.models.outline import outline_base
from support import random_models as models
from support.model_folders import Folder, refused, same_as_transformers


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act: relu"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "much"}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "su"),
        ({"is_causal": False}, "is_causal"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"num_attention_heads": 4.5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"hidden_size": 2**30, "head_dim": None}, "head_dim"),
        ({"model_type": "gpt2"}, "architecture 'gpt2'"),
        ({"model_type": None}, "architecture None"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ],
    ids=str,
)
def test_arithmetic_that_is_not_supported_is_refused(folder: Folder, fields: dict[str, Any], said: str):
    path = folder(**fields)
    refused(path, said)
    with pytest.raises(UserError, match=r"model\.base"):
        outline_base(ModelConfig(base=str(path)))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "swish"},
        {"rms_norm_eps": 0.3},
        {"pretraining_tp": 2, "use_cache": False, "torch_dtype": "bfloat16", "_name_or_path": "x/y"},
        {"rope_parameters": None, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "mscale": 2.0}},
        {"sliding_window": 4},
        {"head_dim": None},
    ],
    ids=str,
)
def test_what_is_supported_is_as_transformers(folder: Folder, fields: dict[str, Any]):
    """Old and new names of rotary settings, a head size that follows, a window that Llama does not read."""
    same_as_transformers(folder(**fields))


@pytest.mark.parametrize("field", ["attention_multiplier", "clip_qkv", "rope_interleaved", "unsloth_version"])
def test_a_field_that_transformers_ignores_is_ignored(folder: Folder, field: str):
    same_as_transformers(folder(**{field: 0.25}))


def test_a_field_that_nobody_here_knows_is_held_against_transformers(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    """A later transformers whose Llama halves its logits at the word of a new field."""
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * getattr(self.config, "logits_divided_by", 1.0)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", halved)
    refused(folder(logits_divided_by=0.5), "change what the model computes", "logits_divided_by")


@pytest.mark.parametrize("architecture", models.EXTRA)
@pytest.mark.parametrize("seed", range(3))
def test_random_configurations_are_as_transformers(architecture: str, seed: int, tmp_path: Path):
    """Biases, head sizes, groups, tied heads, epsilons and rotary scalings as they come, of every family."""
    same_as_transformers(models.random_folder(architecture, seed, tmp_path))


@pytest.mark.parametrize(
    ("architecture", "fields", "window"),
    [
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": None}, 4096),
        ("llama", {"sliding_window": 16}, None),
        ("qwen2", {"sliding_window": 16}, None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}, 16),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3, "layer_types": None},
            None,
        ),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 16),
    ],
)
def test_the_window_is_that_of_the_blocks_that_have_one(
    folder: Folder, architecture: str, fields: dict[str, Any], window: int | None
):
    """A Mistral that names none has transformers' default, 4,096; Qwen's blocks have one only from max_window_layers on."""
    assert attention_window(load_config(ModelConfig(base=str(folder(architecture, **fields))))) == window
