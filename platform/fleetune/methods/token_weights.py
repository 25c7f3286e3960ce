"""Token weights of natural language fine-tuning: how much each response token counts, by its probability on another path.

Liu et al. 2024, "Natural Language Fine-Tuning", arXiv 2412.20382, whose rule for right answers Huang et al. 2026 (LESFT, CMC
87(1), 66) take over. P~_t is the probability of the response's token t on the reference path, whose prompt holds the solution:

    salient       P~_t > p_sal                     S_t = 1 + ((P~_t - p_sal) / (1 - p_sal))^g1      (16)
    sub-salient   beside a salient one, and alike  S_t = (P~_t / p_sal)^g2
    irrelevant    all others                       S_t = (P~_t / p_sal)^g3,  g2 < g3

All three are 1 at P~_t = p_sal, so S is continuous there.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

ClusterMode = Literal["similarity", "nlft_code", "none"]
THRESHOLD = 0.4
"""A neighbour joins a salient token's cluster if its similarity to the centre is above (the released code of NLFT)."""


def token_weights(
    log_reference: Tensor, sub_salient: Tensor, *, p_sal: float, gammas: tuple[float, float, float]
) -> Tensor:
    """S_t of equation (16), (M,), from log P~_t, ``log_reference (M,)``, and who is in a cluster, ``sub_salient (M,)`` bool.

    A token that is both is salient. The gradient goes through P~_t unless it is detached.
    """
    g1, g2, g3 = gammas
    reference = log_reference.exp()
    # `where` passes on the gradients of all branches, times 0 for those not taken: each must be finite for every P~_t. So the
    # base of the first is kept from going below 0, and the powers of the others are taken by logarithms, also at P~_t = 0.
    above = ((reference - p_sal) / (1 - p_sal)).clamp(min=0.0)
    below = log_reference - math.log(p_sal)
    small = torch.where(sub_salient, g2 * below, g3 * below).exp()
    return torch.where(reference > p_sal, 1 + above**g1, small)


def clusters(features: Tensor, salient: Tensor, owner: Tensor, *, mode: ClusterMode) -> Tensor:
    """True for tokens that contiguous clustering around a salient token reaches, the salient ones among them, (M,) bool.

    ``features (M, D)``: the hidden state that predicts each token; ``salient (M,)`` bool; ``owner (M,)``: each token's example,
    tokens of one example in a row. From each salient token the walk goes left while the next token is like the centre, which
    moves half of the way to every token that joins; then right in the same way, with the centre as the walk to the left has
    left it. ``similarity`` lets a token join if its cosine to the centre is above 0.4; ``nlft_code`` does so if 1 - cosine is,
    as NLFT's released code, whose helper returns a distance. All salient tokens walk at once: O(longest cluster) steps.
    """
    if mode == "none":
        return salient.clone()
    joined, size = salient.clone(), len(salient)
    starts = salient.nonzero().squeeze(1)
    centres = features[starts].clone()  # (N, D)
    for way in (-1, 1):
        place, walking = starts.clone(), torch.ones_like(starts, dtype=torch.bool)
        while bool(walking.any()):
            place = place + way
            inside = (place >= 0) & (place < size)
            there = place.clamp(0, size - 1)
            neighbours = features[there]
            cosine = torch.nn.functional.cosine_similarity(centres, neighbours, dim=1)
            alike = (cosine if mode == "similarity" else 1 - cosine) > THRESHOLD
            walking = walking & inside & (owner[there] == owner[starts]) & alike
            joined[there[walking]] = True
            centres = torch.where(walking[:, None], (centres + neighbours) / 2, centres)
    return joined


def client_means(values: Tensor, owner: Tensor, num_examples: int, num_clients: int, *, over: str) -> Tensor:
    """Each client's mean, (K,), of token values ``(M,)``. ``owner (M,)`` is each token's example; a client's stand in a row.

    ``over="examples"``: the mean over a client's examples of each one's mean over its tokens, as equation (17) has it; examples
    without tokens, which fill up a batch, do not count. ``over="tokens"``: the mean over all its tokens.
    """
    per_client = num_examples // num_clients
    if over == "tokens":
        client = owner // per_client
        counts = torch.bincount(client, minlength=num_clients)
        sums = torch.zeros(num_clients, dtype=values.dtype, device=values.device).index_add(0, client, values)
        return sums / counts.clamp(min=1)
    counts = torch.bincount(owner, minlength=num_examples)
    sums = torch.zeros(num_examples, dtype=values.dtype, device=values.device).index_add(0, owner, values)
    means = (sums / counts.clamp(min=1)).view(num_clients, per_client)
    return means.sum(1) / (counts.view(num_clients, per_client) > 0).sum(1).clamp(min=1)
