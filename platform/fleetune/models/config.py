"""The fields of a job file for the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fleetune.config import Config, Place

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRAConfig(Config):
    """Low-rank adapters (Hu et al. 2022, arXiv 2106.09685): dW = (alpha / rank) B A."""

    rank: int = Field(8, ge=1, le=16_384)
    """Rows of A and columns of B."""
    alpha: float = Field(16.0, gt=0, le=1e6)
    """Scaling numerator: the product is scaled by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: all-linear, or names such as [q_proj, v_proj]."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training; above 0 clients train one by one."""

    @field_validator("targets", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        names = [value] if isinstance(value, str) and value != "all-linear" else value
        if isinstance(names, (list, tuple)):
            unknown = [n for n in names if n not in LINEAR_NAMES]
            if unknown or not names:
                raise ValueError(f"must be all-linear or a list out of {', '.join(LINEAR_NAMES)}; got {list(names)}")
        return names

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of the adapted linear layers."""
        return LINEAR_NAMES if self.targets == "all-linear" else tuple(self.targets)

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


class ModelConfig(Config):
    """The frozen base model and the adapter that is trained on it."""

    base: Place = "micro-llama"
    """Built-in name (micro-llama), a local folder with config.json and safetensors, or a hub id (`owner/name`)."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Storage of the frozen linear layers, through bitsandbytes."""
    lora: LoRAConfig = LoRAConfig()
    """The adapter."""
