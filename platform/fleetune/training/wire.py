"""What becomes of a tensor that crosses the cut of a split model: its form on the wire, and the bytes of that form.

Both directions use the same form. ``same`` sends the tensor as it is. ``fp16`` rounds every number to half precision. ``int8``
sends one scale of 4 bytes per token, the token's largest magnitude / 127, and every number as a multiple of it (round to
nearest). A receiver gets what the sender's form holds, so what is rounded away is lost to the training, too.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CutPrecision = Literal["same", "fp16", "int8"]

# Gradients of a mean loss are as small as fp16's smallest numbers. Both sides know this factor, so it costs no bytes; as a power
# of two it is exact. Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740, scale the loss for this reason.
GRADIENT_SCALE = 1024.0
SCALE_BYTES = 4


def received(sent: Tensor, precision: CutPrecision, *, scale: float = 1.0) -> Tensor:
    """The tensor ``sent (…, D)`` as the other side gets it, of the same shape and type; NaN stays NaN.

    ``scale``: a factor by which fp16 is multiplied on the wire.
    """
    if precision == "same":
        return sent
    if precision == "fp16":
        largest = torch.finfo(torch.float16).max
        return (sent * scale).clamp(-largest, largest).half().to(sent.dtype) / scale
    step = sent.abs().amax(dim=-1, keepdim=True).float() / 127  # (…, 1)
    whole = (sent / step.clamp(min=torch.finfo(torch.float32).tiny)).round()
    # `whole` is within ±127, so that int8 holds it; it stays in floating point here, where NaN is not lost.
    return (whole * step).to(sent.dtype)


def wire_bytes(tensor: Tensor, precision: CutPrecision) -> int:
    """Bytes of ``tensor (…, D)`` on the wire."""
    if precision == "same":
        return tensor.nbytes
    if precision == "fp16":
        return 2 * tensor.numel()
    return tensor.numel() + SCALE_BYTES * (tensor.numel() // tensor.shape[-1])
