"""Frozen pools of pairs at linear layers, and the gates that mix them, for K clients at once.

Several adapters that exist already are held beside a linear layer (`models.model.Model.held`), where all clients share them.
``pool.<n>.<site>.lora_A`` (r_n, in) and ``.lora_B`` (out, r_n) are the n-th adapter's, its scale multiplied into B. Ranks may
differ, also to 0 where an adapter has no pair. Joined they are the M = sum_n r_n ranks of the pool:

        E_i(x) = b_i <a_i, x>              the i-th rank                        a (M, in), b (M, out)
        E_n(x) = B_n A_n x                 the n-th adapter, the sum of its ranks

What is trained, and differs from client to client, is a gate (K, …), known by its names:

        <block>.flow_weight, flow_bias     softmax(W h) + b of the residual stream h at the block's beginning, (N, hidden), (N,):
                                           the weights of the N adapters at all linear layers of the block
        <site>.mole_gate, mole_log_tau     softmax(<e, norm(E_1(x) … E_N(x))> / tau), (N, N, out), (1,)
        <site>.router                      logits W x of the experts, (E, in); E = M: ranks, E = N: adapters of one rank
        <site>.router_down, router_up      the same of low rank, W = U D: (rho, in), (E, rho)
        <block>.block_router               the same for all linear layers of a block, of the residual stream: (E, hidden)
        <site>.expert_gate                 a factor for each rank, (M,)

A router also needs the quota of its site: the best q experts of each token are computed, the others are not. It is the length of
a held tensor, the factors s_m by which the gates of a token's best, second best … expert are multiplied:

        <site>.kept_scale (q,)             gates are the softmax over the logits that are kept
        <site>.pool_scale (q,)             gates are the softmax over all logits, of which the best are kept

A site without either gets nothing from the pool: the quota is 0.

Wu et al. 2024, "Mixture of LoRA Experts", ICLR 2024, arXiv 2404.13628. Wang et al. 2024, "LoRA-Flow", ACL 2024, arXiv 2402.11455.
Wu et al. 2025, "Don't Reinvent the Wheel, Just Realign the Spokes" (SmartFed), ICML 2026, arXiv 2512.00902.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fleetune.models.routed import routed
from fleetune.tensors import Tensors

POOL = "pool."
"""Begins the names of a pool's pairs."""

POOL_AXES: dict[str, tuple[str, ...]] = {
    "flow_weight": ("adapter", "hidden"),
    "flow_bias": ("adapter",),
    "mole_gate": ("adapter", "adapter", "out"),
    "mole_log_tau": ("one",),
    "router": ("expert", "in"),
    "block_router": ("expert", "hidden"),
    "router_down": ("low", "in"),
    "router_up": ("expert", "low"),
    "expert_gate": ("expert",),
    "importance": ("expert",),
    "fusion": ("expert",),
    "kept_scale": ("slot",),
    "pool_scale": ("slot",),
}
"""What each axis counts (`models.adapters.AXES`)."""


class Pool(nn.Module):
    """The adapters at one linear layer, their ranks joined. They are buffers, so that a cost trace books them as weights."""

    a: Tensor
    b: Tensor
    scale: Tensor | None

    def __init__(self, a: Tensor, b: Tensor, ranks: tuple[int, ...], scale: Tensor | None, *, over_all: bool):
        """``a`` (M, in), ``b`` (M, out), ``ranks`` of the N adapters; ``scale`` (q,) or None, and of which gates it is."""
        super().__init__()
        self.ranks, self.over_all = ranks, over_all
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    def of(cls, held: Tensors, site: str, *, dtype: torch.dtype, device: torch.device) -> Pool | None:
        """The pool of a site among the held tensors, in the type of the products, or None if no adapter has a pair there."""
        count = num_adapters(held)
        found = [held.get(f"{POOL}{n}.{site}.lora_A") for n in range(count)]
        if all(a is None for a in found):
            return None

        def placed(tensor: Tensor) -> Tensor:
            return tensor if tensor.is_meta else tensor.to(device)

        a = torch.cat([a for a in found if a is not None])
        b = torch.cat([held[f"{POOL}{n}.{site}.lora_B"] for n, a_n in enumerate(found) if a_n is not None], dim=1)
        ranks = tuple(0 if a_n is None else len(a_n) for a_n in found)
        kept, over_all = held.get(f"{site}.kept_scale"), held.get(f"{site}.pool_scale")
        scale = kept if kept is not None else over_all
        return cls(
            placed(a.to(dtype)),
            placed(b.mT.contiguous().to(dtype)),
            ranks,
            None if scale is None else placed(scale),
            over_all=kept is None,
        )

    def by_rank(self, weights: Tensor) -> Tensor:
        """A weight for each adapter (…, N) as one for each of its ranks (…, M)."""
        return torch.cat([weights[..., n : n + 1].expand(*weights.shape[:-1], r) for n, r in enumerate(self.ranks)], -1)

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """sum_i w_i E_i(x) over all ranks: x (K, n, in), weights (K, n or 1, M) -> (K, n, out)."""
        return ((x @ self.a.to(x.dtype).mT) * weights.to(x.dtype)) @ self.b.to(x.dtype)


def num_adapters(held: Tensors) -> int:
    """N: how many adapters the pools among the held tensors are made of."""
    return 1 + max((int(name.split(".")[1]) for name in held if name.startswith(POOL)), default=-1)


class Mixture(Protocol):
    """What is added to a linear layer's output: x (K b, S, in) -> (K b, S, out), clients' rows one after the other."""

    gates: Tensor | None
    """(K, n, E): each token's gates of all experts in the last call, 0 for those not chosen; None if nobody asked for them."""

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to the output for the input x."""
        ...


class BlockGate:
    """A linear map of the residual stream at a block's beginning, read by all linear layers of the block."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """``weight`` (K, N, hidden); ``bias`` (K, N) or None, for a router."""
        self.weight, self.bias = weight, bias
        self.scores: Tensor | None = None

    @classmethod
    def of(cls, stacked: Tensors, block: int) -> BlockGate | None:
        """The gate of a block among a cohort's tensors, or None."""
        weight = stacked.get(f"layers.{block}.flow_weight")
        if weight is not None:
            return cls(weight, stacked[f"layers.{block}.flow_bias"])
        router = stacked.get(f"layers.{block}.block_router")
        return None if router is None else cls(router, None)

    def __call__(self, h: Tensor) -> None:
        """h (K b, S, hidden): note what its map gives, (K, n, N)."""
        by_client = h.reshape(len(self.weight), -1, h.shape[-1])
        self.scores = by_client @ self.weight.to(h.dtype).mT

    def logits(self, x: Tensor) -> Tensor:
        """The noted scores, for a layer's input x that they do not depend on."""
        assert self.scores is not None, "a block's gate runs before its linear layers"
        return self.scores


class Flow:
    """Whole adapters, mixed by the block's gate: sum_n (softmax(W h)_n + b_n) E_n(x), the bias outside the softmax."""

    def __init__(self, pool: Pool, gate: BlockGate, *, notes: bool):
        self.pool, self.gate, self.notes = pool, gate, notes
        self.gates: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (K b, S, in) -> (K b, S, out)."""
        bias = self.gate.bias
        assert bias is not None
        gates = torch.softmax(self.gate.logits(x).float(), -1) + bias[:, None]
        self.gates = gates if self.notes else None
        x_k = x.reshape(len(bias), -1, x.shape[-1])
        return self.pool.mixed(x_k, self.pool.by_rank(gates)).view(*x.shape[:-1], -1)


class MoLE:
    """Whole adapters, mixed by a gate that reads their outputs: sum_n G_n E_n(x) (section 3.2 of MoLE), token by token."""

    def __init__(self, pool: Pool, gate: Tensor, log_tau: Tensor):
        """``gate`` (K, N, N, out), the learnt e; ``log_tau`` (K, 1)."""
        self.pool, self.gate, self.log_tau = pool, gate, log_tau
        self.gates: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (K b, S, in) -> (K b, S, out)."""
        x_k = x.reshape(len(self.gate), -1, x.shape[-1])
        parts = (x_k @ self.pool.a.to(x.dtype).mT).split(self.pool.ranks, -1)
        rows = self.pool.b.to(x.dtype).split(self.pool.ranks)
        outputs = torch.stack([part @ b for part, b in zip(parts, rows, strict=True)], 2)  # E_n(x): (K, n, N, out)
        joined = outputs.flatten(2)  # (K, n, N out)
        normed = nn.functional.layer_norm(joined, joined.shape[-1:])
        scores = normed @ self.gate.flatten(2).to(x.dtype).mT  # (K, n, N)
        self.gates = torch.softmax(scores.float() / self.log_tau[:, None].exp(), -1)
        mixed = torch.einsum("knad,kna->knd", outputs, self.gates.to(x.dtype))
        return mixed.reshape(*x.shape[:-1], -1)


class Router:
    """The best q experts of each token, weighted by their gates: sum_{i in top q} s_m g_i E_i(x)."""

    def __init__(self, pool: Pool, logits: Callable[[Tensor], Tensor], num_clients: int, *, notes: bool):
        """``logits``: a client's input (K, n, in) -> the experts' logits (K, n, E)."""
        self.pool, self.logits, self.num_clients, self.notes = pool, logits, num_clients, notes
        self.gates: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (K b, S, in) -> (K b, S, out)."""
        pool, scale = self.pool, self.pool.scale
        assert scale is not None
        logits = self.logits(x.reshape(self.num_clients, -1, x.shape[-1])).float()
        kept, index = logits.topk(len(scale), -1)  # (K, n, q), the best first
        gates = torch.softmax(logits, -1).gather(2, index) if pool.over_all else torch.softmax(kept, -1)
        weights = gates * scale
        self.gates = torch.zeros_like(logits).scatter(2, index, weights) if self.notes else None
        size = len(pool.a) // logits.shape[-1]  # ranks of an expert
        if size > 1:
            index = (index[..., None] * size + torch.arange(size, device=x.device)).flatten(2)
            weights = weights[..., None].expand(*weights.shape, size).flatten(2)
        flat = x.reshape(-1, x.shape[-1])
        args = (weights.flatten(0, 1).to(x.dtype), index.flatten(0, 1), pool.a.to(x.dtype), pool.b.to(x.dtype))
        return routed(flat, *args).view(*x.shape[:-1], -1)


class Gated:
    """All ranks, each times a factor of its own: sum_i m_i E_i(x). The loss's slope along m_i says how much expert i matters."""

    gates: Tensor | None = None

    def __init__(self, pool: Pool, factors: Tensor):
        """``factors`` m (K, M)."""
        self.pool, self.factors = pool, factors

    def __call__(self, x: Tensor) -> Tensor:
        """x (K b, S, in) -> (K b, S, out)."""
        x_k = x.reshape(len(self.factors), -1, x.shape[-1])
        return self.pool.mixed(x_k, self.factors[:, None]).view(*x.shape[:-1], -1)


def mixture(stacked: Tensors, site: str, pool: Pool | None, of_block: BlockGate | None) -> Mixture | None:
    """What stands beside a linear layer: its pool mixed by its own gate or by its block's. None without a pool or a gate."""
    if pool is None:
        return None
    notes = f"{site}.fusion" in stacked
    if f"{site}.expert_gate" in stacked:
        return Gated(pool, stacked[f"{site}.expert_gate"])
    if f"{site}.mole_gate" in stacked:
        return MoLE(pool, stacked[f"{site}.mole_gate"], stacked[f"{site}.mole_log_tau"])
    if of_block is not None and of_block.bias is not None:
        return Flow(pool, of_block, notes=notes)
    if pool.scale is None:
        return None
    if of_block is not None:
        return Router(pool, of_block.logits, len(of_block.weight), notes=notes)
    maps = [stacked[f"{site}.{name}"] for name in ("router_down", "router_up", "router") if f"{site}.{name}" in stacked]
    if not maps:
        return None

    def logits(x: Tensor) -> Tensor:
        for weight in maps:
            x = x @ weight.to(x.dtype).mT
        return x

    return Router(pool, logits, len(maps[0]), notes=notes)
