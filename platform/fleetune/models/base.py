"""The frozen base model as a value: a configuration and named weights that every worker of a node maps, not copies."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fleetune.cost import shapes
from fleetune.errors import UserError, nearest
from fleetune.models.config import ModelConfig
from fleetune.models.quantize import quantize_linears
from fleetune.tensors import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ASSETS = Path(__file__).parent.parent / "assets"
BUILT_IN = {
    "micro-llama": "a Llama of 16 layers trained by jobs/pretrain_micro_llama.py, shipped with the package",
}
# Decoders that run as embed -> blocks(h, position embeddings) -> norm -> head, checked against their own forward
# by tests/test_network.py.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")
# Those whose frequencies do not change within a model's positions; longrope's depend on the length of each text.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# What is read of a configuration.
SIZES = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
}


PRODUCT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BaseModel:
    """Pretrained weights that never change. ``weights`` hold the names of the Hugging Face checkpoint."""

    name: str
    config: dict[str, Any]
    weights: Tensors
    quantization: str
    folder: str
    """Where the tokenizer lies: a folder, or a hub id."""

    def hf_config(self, num_layers: int | None = None) -> PretrainedConfig:
        """The architecture as transformers knows it, for ``num_layers`` blocks (default: all)."""
        from transformers import AutoConfig

        values = dict(self.config)
        if num_layers is not None and num_layers != values["num_hidden_layers"]:
            values["num_hidden_layers"] = num_layers
            values.pop("layer_types", None)
        return AutoConfig.for_model(**values)

    @cached_property
    def shape(self) -> shapes.ModelShape:
        """The architecture's sizes, without loading transformers."""
        return shapes.ModelShape.from_values(self.config)

    @property
    def num_layers(self) -> int:
        """Blocks of the whole model."""
        return int(self.config["num_hidden_layers"])

    @property
    def is_outline(self) -> bool:
        """Whether the weights are names and sizes alone (`models.outline`): a plan's base."""
        return any(weight.is_meta for weight in self.weights.values())


def placed(base: BaseModel, *, device: str, precision: str) -> BaseModel:
    """The base where networks compute with it: a copy on another device, matrices in the type of their products.

    On the CPU in fp32 that is the base itself, whose memory all processes share. With bf16 the matrices are rounded once,
    as autocast would for every product; norms, biases and the statistics of quantised matrices keep their type.
    """

    def moved(name: str, weight: Tensor) -> Tensor:
        is_matrix = name.endswith(".weight") and weight.ndim == 2 and weight.is_floating_point()
        return weight.to(device, PRODUCT_DTYPES[precision] if is_matrix else weight.dtype)

    return replace(base, weights={name: moved(name, weight) for name, weight in base.weights.items()})


def find_base(name: str) -> str:
    """The folder of a built-in or local model, or the hub id itself. Raises UserError where a path is not there."""
    if name in BUILT_IN:
        return str(ASSETS / name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                "the folder holds no config.json",
                field="model.base",
                value=name,
                hint="save the model with model.save_pretrained(folder) and its tokenizer beside it",
            )
        return str(path)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or path.suffix or name.count("/") != 1
    if looks_local:
        guess = nearest(name, BUILT_IN)
        hint = f"did you mean {guess!r}? " if guess else ""
        if name in shapes.ARCHITECTURES:
            hint = "an architecture without weights: cost it with cost.model, or plan for it with `fleetune plan`; "
        raise UserError(
            "no such model: neither built-in nor a folder",
            field="model.base",
            value=name,
            hint=f"{hint}built-in: {', '.join(BUILT_IN)}; or a folder, or a hub id like org/name",
        )
    return name


def load_config(config: ModelConfig) -> dict[str, Any]:
    """The architecture of the base model, without its weights."""
    folder = find_base(config.base)
    complete = _complete_config(folder)
    if complete is not None:
        return complete
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(
            f"the model cannot be read: {str(error).splitlines()[0]}",
            field="model.base",
            value=config.base,
            hint="offline, give a folder that holds the model",
        ) from error
    if hf_config.model_type not in ARCHITECTURES:
        raise UserError(
            f"architecture {hf_config.model_type!r} is not supported",
            field="model.base",
            value=config.base,
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    values = hf_config.to_dict()
    rope = values["rope_parameters"].get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise UserError(
            f"rotary embeddings of type {rope!r} are not supported",
            field="model.base",
            value=config.base,
            hint=f"supported: {', '.join(ROPE_TYPES)}",
        )
    return values


def _complete_config(folder: str) -> dict[str, Any] | None:
    """A local config.json that leaves nothing to the defaults of transformers, whose import takes seconds; else None."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    is_complete = isinstance(values, dict) and values.keys() >= SIZES and values.get("model_type") == "llama"
    rope = values["rope_parameters"] if is_complete else None
    return values if isinstance(rope, dict) and rope.get("rope_type") == "default" else None


def load_base(config: ModelConfig) -> BaseModel:
    """Read the weights (safetensors only), in fp32 or quantised as the job file says."""
    folder = find_base(config.base)
    values = load_config(config)
    weights = _read_weights(folder, config.base)
    if config.quantization != "none":
        weights = quantize_linears(weights, config.quantization)
    return BaseModel(config.base, values, weights, config.quantization, folder)


def _read_weights(folder: str, name: str) -> Tensors:
    from safetensors.torch import load_file

    root = Path(folder)
    if not root.is_dir():
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(folder, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
        except Exception as error:
            raise UserError(
                f"the hub did not give the model: {str(error).splitlines()[0]}",
                field="model.base",
                value=name,
                hint="offline, give a folder that holds the model",
            ) from error
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise UserError(
            "the folder holds no .safetensors file",
            field="model.base",
            value=name,
            hint="convert it: model.save_pretrained(folder, safe_serialization=True)",
        )
    weights: Tensors = {}
    for file in files:
        weights.update(load_file(file))
    return {n: w.to(torch.float32) if w.is_floating_point() else w for n, w in weights.items()}


def load_tokenizer(folder: str) -> Any:
    """The base model's own fast tokenizer."""
    try:
        if _is_generic_tokenizer(folder):
            from transformers.tokenization_utils_tokenizers import TokenizersBackend

            return TokenizersBackend.from_pretrained(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(
            f"the tokenizer cannot be read: {str(error).splitlines()[0]}",
            field="model.base",
            value=folder,
            hint="save it beside the model: tokenizer.save_pretrained(folder)",
        ) from error


def _is_generic_tokenizer(folder: str) -> bool:
    """Whether a local tokenizer.json is all there is to it, so that the class to read it with need not be looked up."""
    try:
        values = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    generic = isinstance(values, dict) and values.get("tokenizer_class") == "TokenizersBackend"
    return generic and (Path(folder) / "tokenizer.json").is_file()
