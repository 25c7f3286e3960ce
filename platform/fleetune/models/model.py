"""What a client holds, as one value: the same for training, for tracing what it costs, and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fleetune.models.submodel import Submodel
from fleetune.tensors import Tensors

MERGED = (".merged_A", ".merged_B")
"""Ends of the names of held pairs that are part of the matrices themselves."""


@dataclass(frozen=True, eq=False)
class Model:
    """Frozen blocks of the base model and what else is frozen and shared by a cohort. Adapters are no part of it."""

    submodel: Submodel
    """The blocks."""
    held: Tensors = field(default_factory=dict)
    """Frozen tensors beside the base's, named by site: ``layers.3.self_attn.q_proj.delta`` (out, in) is added to that matrix;
    the scaled product of a pair ``….merged_A`` (r, in) and ``….merged_B`` (out, r) is part of it, so that it is quantised too
    and takes no memory of its own."""
    quantization: Literal["nf4", "int8"] | None = None
    """Storage of the blocks' matrices, if it is another than the base's."""

    def is_base(self, num_layers: int) -> bool:
        """True if this is the base model of ``num_layers`` blocks itself."""
        if self.quantization is not None or not self.submodel.is_whole(num_layers):
            return False
        return not any(tensor.any() for tensor in self.held.values())

    @property
    def merged(self) -> Tensors:
        """The held pairs that are part of the blocks' matrices."""
        return {name: tensor for name, tensor in self.held.items() if name.endswith(MERGED)}
