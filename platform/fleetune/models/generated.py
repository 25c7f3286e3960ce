"""Adapters that a small network makes for every half of every block, from who the client is, where it stands and what it sees.

Kim et al. 2023, "Client-Customized Adaptation for Parameter-Efficient Federated Learning", Findings of ACL 2023, arXiv
2411.00311 (C2A). With t numbers in a code, r units, c latent numbers, D the width of the residual stream and y_s (D,) the half's
output at token s:

    code of a token     z_s = by_label p + by_block[l] + by_token y_s / ||y_s|| + two biases                    (t,)
    basis of weights    W_i = row i of (latent basis + shift), W_i / ||W_i||;  latent basis is (t, r, D)        (t, r D)
    generated weights   w_s = sum_i z_si W_i / ||W_i||                                                          (r D,)
    adapter             y_s + w_s^(r,D)^T GELU(w_s^(D,r)^T y_s + inner_bias) + outer_bias

p are the parts of the client's examples in each category, l is the block. The same w_s serves twice: as (D, r) on the way in
and as (r, D) on the way out. This is one list of numbers read in two ways, not a matrix and its transpose.

In the authors' code one code holds for a batch: its last term is a mean over all tokens of all examples. In a causal model that
would show a token the tokens after it and other examples, so here each token has its own. w_s is linear in z_s, hence

    w_s^(D,r)^T y_s = sum_i z_si (W_i^(D,r)^T y_s)    and    w_s^(r,D)^T g = sum_i W_i^(r,D)^T (z_si g):

two products with a matrix that is the same for all tokens, (D, t r) and (t r, D), and no matrix per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fleetune.tensors import Tensors

HISTOGRAM = "client.histogram"
"""Parts p (C,) of a client's examples in each category. It is an input: it is neither trained nor sent."""

SMALLEST_NORM = 1e-12
"""A vector of a smaller norm than this is divided by it: zeros stay zeros."""

GENERATOR_AXES: dict[str, tuple[str, ...]] = {
    "latent": ("code", "unit", "latent"),
    "basis": ("latent", "hidden"),
    "shift": ("unit", "hidden"),
    "by_block": ("blocks", "code"),
    "by_label": ("code", "category"),
    "by_label_bias": ("code",),
    "by_token": ("code", "hidden"),
    "by_token_bias": ("code",),
    "inner_bias": ("unit",),
    "outer_bias": ("hidden",),
    "histogram": ("category",),
}
"""What each axis counts (`models.adapters.AXES`). The units are no ranks: fewer of them would read the list w in another way."""


class Generator:
    """The generators of K clients, with all that is the same for all blocks already worked out."""

    def __init__(self, tensors: Tensors):
        """``tensors``: those of `GENERATOR_AXES`, (K, …) each, named ``generator.latent`` and so on, and `HISTOGRAM`."""
        own = {name.removeprefix("generator."): tensor for name, tensor in tensors.items()}
        num_clients, size, units, _ = own["latent"].shape
        made = own["latent"].flatten(1, 2) @ own["basis"]  # (K, t r, D)
        rows = made.view(num_clients, size, -1) + own["shift"].flatten(1)[:, None]  # (K, t, r D)
        unit_rows = nn.functional.normalize(rows, dim=-1, eps=SMALLEST_NORM)
        hidden = own["basis"].shape[-1]
        self.size, self.units = size, units
        self.inward = unit_rows.view(num_clients, size, hidden, units).transpose(1, 2).flatten(2)  # (K, D, t r)
        self.outward = unit_rows.view(num_clients, size * units, hidden)  # (K, t r, D)
        self.by_token = own["by_token"].mT  # (K, D, t)
        self.inner_bias, self.outer_bias = own["inner_bias"][:, None], own["outer_bias"][:, None]
        labels = (own["by_label"] @ tensors[HISTOGRAM][:, :, None]).squeeze(2)  # (K, t)
        of_client = labels + own["by_label_bias"] + own["by_token_bias"]
        # Of each block, (K, t): what the code of all its tokens has in common.
        self.of_block = (of_client[:, None] + own["by_block"]).unbind(1)

    @classmethod
    def of(cls, stacked: Tensors) -> Generator | None:
        """The generators among a cohort's tensors, or None if there are none."""
        return cls(stacked) if "generator.latent" in stacked else None


class Generated:
    """The adapter that the generators of K clients make for either half of block ``block``."""

    def __init__(self, generator: Generator, block: int):
        self.generator, self.common = generator, generator.of_block[block]

    def __call__(self, y: Tensor) -> Tensor:
        """y (K b, S, D) -> what is added to it, (K b, S, D)."""
        made, dtype = self.generator, y.dtype
        by_client = y.reshape(len(self.common), -1, y.shape[-1])  # (K, n, D), n = b S tokens
        norms = torch.linalg.vector_norm(by_client, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
        code = self.common[:, None].to(dtype) + (by_client @ made.by_token.to(dtype)) / norms  # z, (K, n, t)
        parts = (by_client @ made.inward.to(dtype)).unflatten(2, (made.size, made.units))  # (K, n, t, r)
        inner = (code[..., None] * parts).sum(dim=2) + made.inner_bias.to(dtype)  # (K, n, r)
        mixed = (code[..., None] * nn.functional.gelu(inner)[:, :, None]).flatten(2)  # (K, n, t r)
        return torch.baddbmm(made.outer_bias.to(dtype), mixed, made.outward.to(dtype)).view(y.shape)
