"""Rows of numbers in 4 bits for the wire: NF4 (Dettmers et al. 2023, "QLoRA", arXiv 2305.14314) with a scale per 64 numbers.

The sixteen levels are the paper's, those of bitsandbytes. Every block of 64 is divided by its largest absolute value, an fp32
scale, and each quotient becomes the nearest level: 4.5 bits a number. A block of zeros comes back as zeros.

Plain PyTorch on any device, so that it can be traced and the same bits come out everywhere; weights of matrices are quantised
by bitsandbytes (`models.quantize`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(LEVELS))


def nf4_bytes(size: int) -> int:
    """Bytes of a row of ``size`` numbers: two codes a byte, and four for each block's scale."""
    return -(-size // 2) + 4 * -(-size // BLOCK)


def to_nf4(rows: Tensor) -> Tensor:
    """fp32 (…, n) -> uint8 (…, nf4_bytes(n)): codes, then scales."""
    size = rows.shape[-1]
    blocks = pad(rows, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))  # (…, blocks, 64)
    scales = blocks.abs().amax(-1)
    unit = blocks / torch.where(scales == 0, torch.ones_like(scales), scales)[..., None]
    # A quotient's code is how many of the fifteen middles between levels lie below it.
    codes = torch.zeros_like(unit, dtype=torch.uint8)
    for middle in _MIDDLES:
        codes += unit > middle
    codes = codes.flatten(-2)[..., : size + size % 2]
    packed = codes[..., 0::2] * 16 + codes[..., 1::2]
    return torch.cat([packed, scales.contiguous().view(torch.uint8)], dim=-1)


def from_nf4(packed: Tensor, size: int) -> Tensor:
    """uint8 (…, nf4_bytes(n)) -> fp32 (…, n)."""
    num_codes = -(-size // 2)
    codes = torch.stack([packed[..., :num_codes] // 16, packed[..., :num_codes] % 16], dim=-1).flatten(-2)[..., :size]
    scales = packed[..., num_codes:].contiguous().view(torch.float32)  # (…, blocks)
    levels = torch.tensor(LEVELS, device=packed.device)
    return levels[codes.long()] * scales.repeat_interleave(BLOCK, dim=-1)[..., :size]
