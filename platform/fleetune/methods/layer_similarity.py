"""How alike a model's blocks are: the cosine of their flattened parameters, of which DevFT's groups are made."""

from __future__ import annotations

import numpy as np
import torch

from fleetune.models.base import BaseModel
from fleetune.models.quantize import dequantize
from fleetune.tensors import Tensors

_PREFIX = "model.layers."


def layer_similarity(base: BaseModel, adapter: Tensors, source: str = "both") -> np.ndarray:
    """W (L, L): cosine of the flattened parameters of every pair of blocks.

    ``source``: ``base`` (de-quantised), ``adapter`` (A and B as they are, not their product), or ``both`` as one vector.
    The inner products are summed tensor by tensor, so that no flattened block is ever formed: memory holds one tensor of
    all L blocks at a time, and no de-quantised copy of the model.
    """
    gram = torch.zeros(base.num_layers, base.num_layers, dtype=torch.float64)
    if source != "adapter":
        first = f"{_PREFIX}0."
        ends = (".weight", ".bias")
        for suffix in [n.removeprefix(first) for n in base.weights if n.startswith(first) and n.endswith(ends)]:
            names = [f"{_PREFIX}{j}.{suffix}" for j in range(base.num_layers)]
            rows = torch.stack([dequantize(base.weights, name, base.quantization).flatten() for name in names])
            gram += (rows @ rows.T).double()
    if source != "base":
        for suffix in [n.removeprefix("layers.0.") for n in adapter if n.startswith("layers.0.")]:
            rows = torch.stack([adapter[f"layers.{j}.{suffix}"].flatten() for j in range(base.num_layers)])
            gram += (rows @ rows.T).double()
    norms = gram.diagonal().sqrt().clamp_min(1e-12)
    return (gram / norms[:, None] / norms[None, :]).numpy()
