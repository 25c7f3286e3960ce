"""The frozen base model as a value: a configuration and named weights, which the workers of a node share without a copy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fleetune.digests import digest_of
from fleetune.models import architectures as shapes
from fleetune.tensors import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PRODUCT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BaseModel:
    """Pretrained weights that never change. ``weights`` hold the names of the Hugging Face checkpoint."""

    name: str
    config: dict[str, Any]
    weights: Tensors
    quantization: str
    folder: str
    """The tokenizer's place: a folder, or a hub id."""
    content: dict[str, str] = field(default_factory=dict)
    """File -> digest, for all files of the model and its tokenizer, taken when the weights were read."""

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
        """Blocks of the full model."""
        return int(self.config["num_hidden_layers"])

    @property
    def key(self) -> str:
        """A text that is the same for two bases only if they hold the same numbers."""
        content = digest_of(part for pair in sorted(self.content.items()) for part in pair)
        return f"{self.name}/{self.quantization}/{content}"

    @property
    def is_outline(self) -> bool:
        """True if the weights are names and sizes alone (`models.outline`), as in a plan."""
        return any(weight.is_meta for weight in self.weights.values())


def placed(base: BaseModel, *, device: str, precision: str) -> BaseModel:
    """The base on the device and in the precision that networks compute in: matrices in the type of their products.

    On the CPU in fp32 its tensors are those of ``base``, whose memory all processes share. With bf16 the matrices are rounded
    once, as autocast would for every product; norms, biases and the statistics of quantised matrices keep their type.
    """

    def moved(name: str, weight: Tensor) -> Tensor:
        is_matrix = name.endswith(".weight") and weight.ndim == 2 and weight.is_floating_point()
        return weight.to(device, PRODUCT_DTYPES[precision] if is_matrix else weight.dtype)

    return replace(base, weights={name: moved(name, weight) for name, weight in base.weights.items()})
