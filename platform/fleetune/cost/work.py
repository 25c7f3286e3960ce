"""What one client computes in a round: the question that is put to the cost model, one per kind of client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fleetune.cost.shapes import ModelShape

DTYPE_BYTES = {"fp32": 4, "bf16": 2}  # of tensors that are stored unquantised


class LoraTarget(NamedTuple):
    """One adapted linear layer: its sizes and rank, and where it is (block position, Hugging Face name)."""

    in_features: int
    out_features: int
    rank: int
    layer: int
    module: str


def lora_targets(
    shape: ModelShape, modules: Iterable[str], *, rank: int, layers: Iterable[int]
) -> tuple[LoraTarget, ...]:
    """The adapters of one rank on ``modules`` (``("q_proj", "v_proj")``) of the blocks at ``layers``."""
    names = tuple(modules)
    return tuple(LoraTarget(*shape.linears[name], rank, layer, name) for layer in layers for name in names)


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """The local work of one kind of client. Hashable: its coefficients are computed once.

    The model has ``num_layers`` blocks. Without ``split`` the client holds and runs all of them and the head.
    With ``split`` the client holds the embedding and blocks [0, split), the server the other blocks, the norm
    and the head; positions in ``trainable_layers`` and ``lora_targets`` count through both parts.
    """

    shape: ModelShape
    num_layers: int
    trainable_layers: tuple[int, ...]
    """Positions of blocks that hold trainable tensors. Backward stops below the lowest."""
    adapter_elements: int
    """Elements of all adapter tensors that the client holds, trainable or not."""
    trainable_elements: int
    lora_targets: tuple[LoraTarget, ...]
    batch_size: int
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_dtype: Literal["fp32", "bf16", "int8", "nf4"] = "bf16"
    """Storage of the blocks' linear weights; when quantised, all else is stored in ``precision``."""
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type in which matrix products are computed."""
    passes: Literal["train", "forward"] = "train"
    forwards_per_step: float = 1.0
    split: int | None = None
    checkpointing: bool = False
    """Blocks keep their input only and are computed again in the backward pass."""
    padding_mask: bool = False
    """Batches hold examples of unequal length.

    Attention keeps its mask, and keys and values for every head.
    """

    def __post_init__(self) -> None:
        assert self.split is None or 0 < self.split < self.num_layers, "the cut lies inside the model"
        assert all(0 <= layer < self.num_layers for layer in self.trainable_layers), "positions of this model"
        assert all(0 <= target.layer < self.num_layers for target in self.lora_targets), "positions of this model"
        assert self.trainable_elements <= self.adapter_elements, "only adapters are trained"

    @property
    def client_layers(self) -> range:
        """Positions of the blocks that the client runs."""
        return range(self.num_layers if self.split is None else self.split)

    @property
    def server_layers(self) -> range:
        """Positions of the blocks that the server runs for the client: none without a split."""
        return range(len(self.client_layers), self.num_layers)

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of an activation."""
        return DTYPE_BYTES[self.precision]

    def lowest_trainable(self, layers: range) -> int | None:
        """The lowest trainable block of ``layers``: where backward ends.

        None where nothing is differentiated.
        """
        inside = [layer for layer in self.trainable_layers if layer in layers]
        return min(inside) if inside and self.passes == "train" else None
