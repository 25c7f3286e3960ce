"""How many experts each matrix may compute for a token: SmartFed's elastic quotas.

Wu et al. 2025, "Don't Reinvent the Wheel, Just Realign the Spokes" (SmartFed), arXiv 2512.00902, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

Residual = Literal["greedy", "round_robin"]


def elastic_quotas(
    importance: Sequence[float], per_matrix: int, caps: Sequence[int], *, residual: Residual = "greedy"
) -> list[int]:
    """The quota q_j of each of J matrices: they sum to B = K J, K ``per_matrix``, and none is above its cap M_j.

    ``importance`` (J,), at least 0 each; alpha_j is its share in the sum, the same for all if the sum is 0. Line 1 to 4 of
    algorithm 1: q_j = min(floor(alpha_j B), M_j). What is left over goes, by falling alpha, to the matrices below their caps:
    ``greedy``, as printed, fills up one after the other; ``round_robin`` gives each one more, again and again.

    There must be room for all: K J <= sum M_j. Shares are exact fractions, so that equal importances give equal quotas.
    """
    budget = per_matrix * len(caps)
    assert budget <= sum(caps), "the caps have no room for the budget"
    shares = [Fraction(value) for value in importance]
    total = sum(shares)
    if not total:
        shares, total = [Fraction(1)] * len(caps), Fraction(len(caps))
    quotas = [min(int(share * budget / total), cap) for share, cap in zip(shares, caps, strict=True)]
    rest = budget - sum(quotas)
    by_share = sorted(range(len(caps)), key=lambda j: (-shares[j], j))
    while rest:
        for j in by_share:
            room = caps[j] - quotas[j]
            given = min(room, rest, room if residual == "greedy" else 1)
            quotas[j] += given
            rest -= given
    return quotas
