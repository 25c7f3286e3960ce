"""Greedy generation for a batch of prompts, with a key-value cache that shrinks as answers end.

Shape legend: B prompts still running, S prompt tokens (padded on the left), T room for prompt and answer, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fleetune.models.block import Attend, run_block
from fleetune.models.fused import rotary
from fleetune.models.network import Network


class Cache:
    """Keys and values of every block for the running prompts, and which of their positions are no padding."""

    def __init__(self, mask: Tensor, *, room: int, num_blocks: int):
        self.length, self.num_blocks = 0, num_blocks
        self.real = nn.functional.pad(mask.bool(), (0, room - mask.shape[1]), value=True)  # (B, T)
        self.keys: list[
            Tensor
        ] = []  # of each block: (B, kv heads, T, d), of which the first `length` positions are filled
        self.values: list[Tensor] = []  # likewise

    def attends(self, num_new: int, dtype: torch.dtype) -> list[Attend]:
        """Attention of ``num_new`` new tokens over the cache, to which it adds them; one function per block."""
        stop, device = self.length + num_new, self.real.device
        visible = self.real[:, None, None, :stop]  # (B, 1, 1, stop), and (B, 1, num_new, stop) for a prompt
        if num_new > 1:
            visible = visible & torch.ones(num_new, stop, dtype=torch.bool, device=device).tril(stop - num_new)
            # A padded position sees itself: a softmax over nothing would be NaN.
            visible = visible | torch.eye(num_new, stop, dtype=torch.bool, device=device)
        bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
        return [self._attention(block, bias, stop) for block in range(self.num_blocks)]

    def _attention(self, block: int, bias: Tensor, stop: int) -> Attend:
        def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
            q, k, v = rotary(q.transpose(1, 2), cos, sin), rotary(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
            if len(self.keys) == block:
                shape = (*k.shape[:2], self.real.shape[1], k.shape[-1])
                self.keys.append(k.new_empty(shape))
                self.values.append(k.new_empty(shape))
            self.keys[block][:, :, self.length : stop] = k
            self.values[block][:, :, self.length : stop] = v
            k, v = self.keys[block][:, :, :stop], self.values[block][:, :, :stop]
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out.transpose(1, 2)

        return attention

    def keep(self, rows: Tensor) -> None:
        """Keep only the prompts ``rows (n,)``; the answers of the others have ended."""
        self.real = self.real[rows]
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


@torch.inference_mode()
def generate(network: Network, ids: Tensor, mask: Tensor, *, max_new_tokens: int, end: int, padding: int) -> Tensor:
    """Continue prompts ``ids, mask (B, S)``, padded on the left, by the likeliest token each time, until ``end``.

    Returns the new tokens (B, max_new_tokens), ``padding`` after the end. The network's adapter is that of one client.
    """
    out = torch.full((len(ids), max_new_tokens), padding, device=ids.device)
    running = torch.arange(len(ids), device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    cache = Cache(mask, room=ids.shape[1] + max_new_tokens, num_blocks=network.num_layers)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tokens = ids
    for step in range(max_new_tokens):
        h = _forward(network, tokens, positions, cache)
        tokens = network.logits(h[:, -1:]).argmax(-1).masked_fill_(ended[:, None], padding)  # (B, 1)
        out[running, step] = tokens[:, 0]
        positions = positions[:, -1:] + 1
        ended |= tokens[:, 0] == end
        if ended.all():
            break
        if ended.sum() >= 0.25 * len(ended):
            rows = (~ended).nonzero().squeeze(1)
            cache.keep(rows)
            running, tokens, positions, ended = running[rows], tokens[rows], positions[rows], ended[rows]
    return out


def _forward(network: Network, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    h = network.embed(tokens)
    cos, sin = network.rotary(h, positions)
    with network.autocast():
        for layer, attend in zip(network.layers, cache.attends(tokens.shape[1], network.dtype), strict=True):
            h = run_block(layer, h, cos, sin, attend)
    cache.length += tokens.shape[1]
    return h
