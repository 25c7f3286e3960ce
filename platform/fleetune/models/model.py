"""What a client holds, as one value: the same for training, for tracing what it costs, and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from fleetune.models.submodel import Submodel
from fleetune.tensors import Tensors


@dataclass(frozen=True, eq=False)
class Model:
    """Frozen blocks of the base model and what else is frozen and shared by a cohort. Adapters are no part of it."""

    submodel: Submodel
    """The blocks."""
    held: Tensors = field(default_factory=dict)
    """Frozen tensors beside the base's, named by site: ``layers.3.self_attn.q_proj.delta`` (out, in) is added to that matrix."""

    def is_base(self, num_layers: int) -> bool:
        """True if this is the base model of ``num_layers`` blocks itself."""
        return self.submodel.is_whole(num_layers) and not any(tensor.any() for tensor in self.held.values())
