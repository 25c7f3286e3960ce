"""DevFT's two building blocks: which layers belong together (DGLG), and how a group becomes one layer (DBLF)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fleetune.errors import UserError
from fleetune.methods.base import MethodConfig
from fleetune.methods.layer_similarity import layer_similarity
from fleetune.models.base import BaseModel
from fleetune.models.submodel import Combination, Submodel
from fleetune.seeds import rng, seed_of
from fleetune.tensors import Tensors

Groups = list[list[int]]
"""Blocks of the model, by group: each group ascending, the groups in the order of their first block. Every block is in one."""


class GroupSettings(MethodConfig):
    """The part of DevFT's settings that says how blocks are grouped and fused."""

    grouping: Literal["dglg", "random", "even", "strided"] = "dglg"
    """How blocks are grouped: by similarity (the paper), at random, into runs of equal length, or every k-th block together."""
    similarity: Literal["both", "base", "adapter"] = "both"
    """Parameters whose cosine says how similar two blocks are: of base and adapter (the paper), or of one of them."""
    laplacian: Literal["unnormalised", "normalised"] = "unnormalised"
    """Laplacian of the spectral clustering: D - W (the paper), or the symmetric normalised one (balanced groups)."""
    contiguous: bool = False
    """Let groups be runs of consecutive blocks only. With dglg they are the runs that cut the least similarity."""
    fusion: Literal["dblf", "r_one", "random_one", "sum", "mean"] = "dblf"
    """How a group becomes one block: around its first block (the paper), its first block alone, one of its blocks drawn at
    random, the plain sum, or the mean."""
    beta: float = Field(0.1, ge=0, le=1)
    """Weight of the differences in DBLF; the paper takes 0.1 for 7B and 8B models, 0.15 for 13B."""


def check_groups(settings: GroupSettings) -> None:
    """Raises UserError if groups would have to be runs of blocks and every k-th block at once."""
    if settings.contiguous and settings.grouping == "strided":
        raise UserError(
            "puts every k-th block into one group, which method.contiguous forbids",
            field="method.grouping",
            value=settings.grouping,
            hint="take even for runs of equal length, or leave method.contiguous out",
        )


def group_layers(
    base: BaseModel, adapter: Tensors, num_groups: int, settings: GroupSettings, *, run_seed: int, stage: int
) -> Groups:
    """Split the blocks into ``num_groups`` groups. ``adapter``: that of all blocks."""
    num_layers = base.num_layers
    if num_groups == num_layers:
        return [[j] for j in range(num_layers)]
    # A base without data has no similarities. Costs depend on how many groups there are, not on which blocks they hold.
    if settings.grouping == "even" or base.is_outline:
        return [chunk.tolist() for chunk in np.array_split(np.arange(num_layers), num_groups)]
    if settings.grouping == "strided":
        return [list(range(first, num_layers, num_groups)) for first in range(num_groups)]
    if settings.grouping == "random":
        generator = rng(run_seed, "devft-groups", stage)
        draw = _random_runs if settings.contiguous else _random_labels
        return _in_order(draw(num_layers, num_groups, generator))
    similarity = layer_similarity(base, adapter, settings.similarity)
    if settings.contiguous:
        return contiguous_groups(similarity, num_groups, laplacian=settings.laplacian)
    seed = seed_of(run_seed, "devft-kmeans", stage)
    return spectral_groups(similarity, num_groups, laplacian=settings.laplacian, seed=seed)


def spectral_groups(similarity: np.ndarray, num_groups: int, *, laplacian: str, seed: int) -> Groups:
    """k-means on the rows, one per block, of the eigenvectors that belong to the smallest eigenvalues of D - W.

    ``similarity``: W, (L, L), symmetric. D is the diagonal of its row sums. An eigenvector's sign is arbitrary, and no matter:
    distances between rows do not depend on it. ``normalised`` takes I - D^-1/2 W D^-1/2 with rows of unit length (Ng, Jordan and
    Weiss 2001), which balances groups.
    """
    from sklearn.cluster import KMeans

    degrees = similarity.sum(axis=1)
    if laplacian == "unnormalised":
        matrix = np.diag(degrees) - similarity
    else:
        scale = 1.0 / np.sqrt(np.maximum(degrees, 1e-12))
        matrix = np.eye(len(similarity)) - scale[:, None] * similarity * scale[None, :]
    _, vectors = np.linalg.eigh(matrix)
    rows = vectors[:, :num_groups]
    if laplacian == "normalised":
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = KMeans(num_groups, n_init=20, random_state=seed % 2**31).fit_predict(rows)
    return _in_order(_refilled(labels, num_groups))


def contiguous_groups(similarity: np.ndarray, num_groups: int, *, laplacian: str) -> Groups:
    """The runs of consecutive blocks for which sum_g cut(g) / size(g) is smallest.

    cut(g) is the similarity between the blocks of g and all others. Spectral clustering is an approximation of that minimum over
    all groups (von Luxburg 2007): with D - W, size(g) is the number of blocks (ratio cut); with the normalised Laplacian it is
    the sum of their degrees (normalised cut). Runs are so few that dynamic programming finds their minimum itself, in
    O(k L^2) steps, without eigenvectors, k-means or a seed: the best n runs up to block b are the best n - 1 runs up to some
    block a, and the run from there to b (`best_runs`).
    """
    return best_runs(_run_costs(similarity, laplacian), num_groups)


def best_runs(cost: np.ndarray, num_groups: int) -> Groups:
    """The ``num_groups`` runs of consecutive blocks whose costs have the smallest sum, by dynamic programming.

    ``cost``: that of the run [start, stop) at [start, stop], (L + 1, L + 1). Of equally good runs the first are taken.
    """
    num_layers = len(cost) - 1
    least = np.full((num_groups + 1, num_layers + 1), np.inf)  # [n, b]: of n runs that cover the first b blocks
    least[0, 0] = 0.0
    last_start = np.zeros((num_groups + 1, num_layers + 1), dtype=int)
    for n in range(1, num_groups + 1):
        for stop in range(n, num_layers + 1):
            totals = least[n - 1, :stop] + cost[:stop, stop]
            last_start[n, stop] = totals.argmin()
            least[n, stop] = totals.min()
    groups: Groups = []
    stop = num_layers
    for n in range(num_groups, 0, -1):
        start = int(last_start[n, stop])
        groups.insert(0, list(range(start, stop)))
        stop = start
    return groups


def _run_costs(similarity: np.ndarray, laplacian: str) -> np.ndarray:
    """cut(g) / size(g) of the run g = [start, stop), at [start, stop], (L + 1, L + 1); other entries are not used."""
    num_layers = len(similarity)
    degrees = similarity.sum(axis=1)
    # Sums over runs are differences of sums from the first block on.
    volume = np.concatenate([[0.0], degrees.cumsum()])
    inner = np.zeros((num_layers + 1, num_layers + 1))
    inner[1:, 1:] = similarity.cumsum(axis=0).cumsum(axis=1)
    start, stop = np.meshgrid(np.arange(num_layers + 1), np.arange(num_layers + 1), indexing="ij")
    volumes = volume[stop] - volume[start]
    within = inner[stop, stop] - inner[start, stop] - inner[stop, start] + inner[start, start]
    sizes = volumes if laplacian == "normalised" else (stop - start).astype(float)
    # Rounded, so that equally good runs do not depend on a processor's last digits: the first of them is taken.
    return np.round((volumes - within) / np.maximum(sizes, 1e-12), 9)


def fuse(groups: Groups, *, fusion: str, beta: float, run_seed: int = 0) -> Submodel:
    """The submodel with one block per group, as a linear combination of the group's blocks; the anchor a is its first block.

    dblf: theta_a + beta sum_j (theta_j - theta_a), so weights 1 - beta (n - 1) for the anchor and beta for each other block.
    r_one: theta_a. random_one: theta_j, with j drawn from the group. sum: sum_j theta_j. mean: sum_j theta_j / n, which is dblf
    with beta = 1 / n.
    """
    layers: list[Combination] = []
    for group in groups:
        anchor, others = group[0], group[1:]
        if fusion == "r_one" or not others:
            layers.append(((anchor, 1.0),))
        elif fusion == "random_one":
            layers.append(((group[int(rng(run_seed, "devft-one", *group).integers(len(group)))], 1.0),))
        elif fusion == "sum":
            layers.append(tuple((j, 1.0) for j in group))
        elif fusion == "mean":
            layers.append(tuple((j, 1.0 / len(group)) for j in group))
        else:
            layers.append(((anchor, 1.0 - beta * len(others)), *((j, beta) for j in others)))
    return Submodel(tuple(layers))


def _random_labels(num_layers: int, num_groups: int, generator: np.random.Generator) -> np.ndarray:
    """The group of each block, (L,): every group gets one block for certain, the others fall where they may."""
    labels = np.concatenate([np.arange(num_groups), generator.integers(num_groups, size=num_layers - num_groups)])
    return generator.permutation(labels)


def _random_runs(num_layers: int, num_groups: int, generator: np.random.Generator) -> np.ndarray:
    """The group of each block, (L,), if groups are runs: every choice of borders between blocks is equally likely."""
    begins = generator.choice(num_layers - 1, size=num_groups - 1, replace=False) + 1
    return np.isin(np.arange(num_layers), begins).cumsum()


def _refilled(labels: np.ndarray, num_groups: int) -> np.ndarray:
    """The labels (L,) with no group empty: k-means may merge points that coincide, and the largest groups are split again."""
    labels = labels.copy()
    for empty in set(range(num_groups)) - set(labels.tolist()):
        largest = np.bincount(labels, minlength=num_groups).argmax()
        labels[np.flatnonzero(labels == largest)[-1]] = empty
    return labels


def _in_order(labels: np.ndarray) -> Groups:
    """Groups from the label of each block, (L,). Labels are arbitrary numbers, so groups are ordered by their first block."""
    groups: dict[int, list[int]] = {}
    for layer, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(layer)
    return sorted(groups.values(), key=lambda group: group[0])
