"""The shape of a decoder-only language model, from which its costs follow without its weights.

Covers the Llama family and its kin (Llama, Mistral, Qwen2, Qwen3): RMSNorm, grouped-query attention, SwiGLU.
``ARCHITECTURES`` holds the published configurations that can be costed offline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from fleetune.errors import UserError, unknown_name
from fleetune.models.config import LINEAR_NAMES

SOURCE = "config.json of "
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer. ``source`` says where they were published."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2: bias on q, k and v
    qk_norm: bool = False  # Qwen3: RMSNorm on every head of q and k
    out_bias: bool = False  # Llama and Qwen3 with attention_bias: on the output projection too
    mlp_bias: bool = False
    source: str = ""
    max_positions: int = 1 << 30  # tokens of the longest sequence that the published configuration allows

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ModelShape:
        """From the values of a config.json."""
        return cls.from_hf_config(SimpleNamespace(**values))

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelShape:
        """From a transformers configuration. Raises UserError for a family other than Llama, Mistral, Qwen2 and Qwen3."""
        family = getattr(config, "model_type", None)
        if family not in FAMILIES:
            raise UserError(
                "the cost model knows no such family",
                field="cost.model",
                value=family,
                hint=f"known: {', '.join(FAMILIES)}",
            )
        num_heads = config.num_attention_heads
        # Mistral's modules have no bias and Qwen2's always that of q, k and v, whatever a config.json says.
        attention_bias = family in ("llama", "qwen3") and bool(getattr(config, "attention_bias", False))
        return cls(
            name=getattr(config, "_name_or_path", "") or family,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            vocab_size=config.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=family == "qwen2" or attention_bias,
            qk_norm=family == "qwen3",
            out_bias=attention_bias,
            mlp_bias=family == "llama" and bool(getattr(config, "mlp_bias", False)),
            source="the model's own config.json",
            max_positions=int(getattr(config, "max_position_embeddings", None) or 1 << 30),
        )

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear layer of one block, by its Hugging Face name."""
        h, i = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return dict(zip(LINEAR_NAMES, ((h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)), strict=True))

    @property
    def biased(self) -> tuple[str, ...]:
        """The linear layers of a block that have a bias."""
        flags = (self.qkv_bias,) * 3 + (self.out_bias,) + (self.mlp_bias,) * 3
        return tuple(name for name, has_bias in zip(LINEAR_NAMES, flags, strict=True) if has_bias)

    @property
    def linear_params(self) -> int:
        """Weights of one block's linear layers, biases not counted."""
        return sum(num_in * num_out for num_in, num_out in self.linears.values())

    @property
    def other_layer_params(self) -> int:
        """One block's parameters outside its linear weights: two norms, and what the family adds."""
        bias = sum(self.linears[name][1] for name in self.biased)
        return 2 * self.hidden_size + bias + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding_params(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab_size * self.hidden_size

    def num_params(self, num_layers: int | None = None) -> int:
        """Parameters of the model, or of a submodel of ``num_layers`` blocks; a tied head counts once."""
        blocks = self.num_layers if num_layers is None else num_layers
        head = 0 if self.tied_embeddings else self.embedding_params
        block_params = self.linear_params + self.other_layer_params
        return self.embedding_params + blocks * block_params + self.hidden_size + head


def _shape(
    name: str, sizes: tuple[int, int, int, int, int, int, int], *, positions: int, source: str, **flags: bool
) -> ModelShape:
    return ModelShape(name, *sizes, **flags, source=SOURCE + source, max_positions=positions)


# (blocks, hidden, MLP, heads, kv heads, head dim, vocabulary)
ARCHITECTURES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _shape("llama2-7b", (32, 4096, 11008, 32, 32, 128, 32000), positions=4096, source="meta-llama/Llama-2-7b-hf"),
        _shape("llama2-13b", (40, 5120, 13824, 40, 40, 128, 32000), positions=4096, source="meta-llama/Llama-2-13b-hf"),
        _shape("llama3.1-8b", (32, 4096, 14336, 32, 8, 128, 128256), positions=131072, source="meta-llama/Llama-3.1-8B"),
        _shape("llama3.2-3b", (28, 3072, 8192, 24, 8, 128, 128256), positions=131072, source="meta-llama/Llama-3.2-3B",
               tied_embeddings=True),
        # 4,096 positions: beyond, its attention is a sliding window, which nothing here models.
        _shape("mistral-7b", (32, 4096, 14336, 32, 8, 128, 32000), positions=4096, source="mistralai/Mistral-7B-v0.1"),
        _shape("qwen2-7b", (28, 3584, 18944, 28, 4, 128, 152064), positions=131072, source="Qwen/Qwen2-7B", qkv_bias=True),
        _shape("qwen2.5-0.5b", (24, 896, 4864, 14, 2, 64, 151936), positions=32768, source="Qwen/Qwen2.5-0.5B",
               tied_embeddings=True, qkv_bias=True),
        _shape("qwen2.5-1.5b", (28, 1536, 8960, 12, 2, 128, 151936), positions=131072, source="Qwen/Qwen2.5-1.5B",
               tied_embeddings=True, qkv_bias=True),
        _shape("qwen2.5-3b", (36, 2048, 11008, 16, 2, 128, 151936), positions=32768, source="Qwen/Qwen2.5-3B",
               tied_embeddings=True, qkv_bias=True),
        _shape("qwen3-8b", (36, 4096, 12288, 32, 8, 128, 151936), positions=40960, source="Qwen/Qwen3-8B", qk_norm=True),
        _shape("tinyllama-1.1b", (22, 2048, 5632, 32, 4, 64, 32000), positions=2048, source="TinyLlama/TinyLlama_v1.1"),
    )
}  # fmt: skip


def find_architecture(name: str) -> ModelShape | None:
    """The published architecture of that name (``qwen2.5-0.5b``) or hub id (``Qwen/Qwen2.5-0.5B``); None if there is none."""
    return next((s for s in ARCHITECTURES.values() if name in (s.name, s.source.removeprefix(SOURCE))), None)


def architecture(name: str) -> ModelShape:
    """As `find_architecture`. Raises UserError for an unknown name, with the nearest one."""
    shape = find_architecture(name)
    if shape is None:
        raise unknown_name("architecture", name, ARCHITECTURES, field="cost.model")
    return shape
