"""FedSODA's similarity-group pruning (SGP): which blocks of a model a sub-model keeps.

Zhu et al. 2025, "FedSODA", arXiv 2508.12727, names the module and no more; all below is a reconstruction.

Hidden states H_0 (embedding) to H_L (last block) of calibration text say how alike two blocks are, sim(i, j) of their outputs,
and how much a block changes its input: Block Influence, BI_l = 1 - mean cos(H_l, H_{l+1}) for block l from 0 (Men et al. 2024,
"ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853).

Groups are runs of consecutive blocks. A run g is represented by its first block, so it costs sum_{l in g} (1 - sim(first(g), l)).
Of each group the most influential block is kept; of the first and the last one the model's first and last block, which read the
embedding and feed the head.
"""

from __future__ import annotations

import numpy as np

from fleetune.methods.layer_groups import Groups, best_runs


def cheapest_groups(similarity: np.ndarray, num_groups: int) -> Groups:
    """The ``num_groups`` runs whose blocks are most like the first of their run. ``similarity``: (L, L)."""
    return best_runs(run_costs(similarity), num_groups)


def run_costs(similarity: np.ndarray) -> np.ndarray:
    """sum over l in [start, stop) of 1 - sim(start, l), at [start, stop], (L + 1, L + 1); other entries are not used."""
    num_layers = len(similarity)
    cost = np.zeros((num_layers + 1, num_layers + 1))
    for start in range(num_layers):
        cost[start, start + 1 :] = (1.0 - similarity[start, start:]).cumsum()
    # Rounded, so that equally good runs do not depend on a processor's last digits.
    return np.round(cost, 9)


def groups_above(similarity: np.ndarray, threshold: float) -> Groups:
    """A group goes on as long as sim(first(g), l) is at least the threshold; the last block never joins the first one's group."""
    groups: Groups = [[0]]
    for layer in range(1, len(similarity)):
        if similarity[groups[-1][0], layer] >= threshold:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    if len(groups) == 1 and len(similarity) > 1:  # a sub-model has both the model's ends
        groups = [groups[0][:-1], groups[0][-1:]]
    return groups


def kept_blocks(groups: Groups, influence: np.ndarray) -> list[int]:
    """One block of each group, ascending: the most influential, the first of equals. ``influence``: BI, (L,)."""
    kept = [max(group, key=lambda layer: (influence[layer], -layer)) for group in groups]
    kept[0], kept[-1] = groups[0][0], groups[-1][-1]
    return kept
