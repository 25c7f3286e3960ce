"""DevFT's two building blocks: which layers belong together (DGLG), and how a group becomes one layer (DBLF)."""

from __future__ import annotations

import numpy as np
import torch

from fleetune.models.base import BaseModel
from fleetune.models.quantize import dequantize
from fleetune.models.submodel import Combination, Submodel
from fleetune.seeds import rng, seed_of
from fleetune.tensors import Tensors

Groups = list[list[int]]
"""Blocks of the model, by group: each group ascending, the groups in the order of their first block. Every block is in one."""
_PREFIX = "model.layers."


def group_layers(
    base: BaseModel,
    adapter: Tensors,
    num_groups: int,
    *,
    grouping: str,
    laplacian: str,
    run_seed: int,
    stage: int,
) -> Groups:
    """Split the blocks into ``num_groups`` groups."""
    num_layers = base.num_layers
    if num_groups == num_layers:
        return [[j] for j in range(num_layers)]
    # A base without data has no similarities. Costs depend on how many groups there are, not on which blocks they hold.
    if grouping == "even" or base.is_outline:
        return [chunk.tolist() for chunk in np.array_split(np.arange(num_layers), num_groups)]
    if grouping == "random":
        return _in_order(_random_labels(num_layers, num_groups, rng(run_seed, "devft-groups", stage)))
    similarity = layer_similarity(base, adapter)
    return spectral_groups(similarity, num_groups, laplacian=laplacian, seed=seed_of(run_seed, "devft-kmeans", stage))


def layer_similarity(base: BaseModel, adapter: Tensors) -> np.ndarray:
    """W (L, L): cosine of the flattened parameters of every pair of blocks, de-quantised base and adapter together.

    The inner products are summed tensor by tensor, so that no flattened block is ever formed: memory holds one tensor of
    all L blocks at a time, and no de-quantised copy of the model.
    """
    gram = torch.zeros(base.num_layers, base.num_layers, dtype=torch.float64)
    first = f"{_PREFIX}0."
    suffixes = [n.removeprefix(first) for n in base.weights if n.startswith(first) and n.endswith((".weight", ".bias"))]
    for suffix in suffixes:
        names = [f"{_PREFIX}{j}.{suffix}" for j in range(base.num_layers)]
        rows = torch.stack([dequantize(base.weights, name, base.quantization).flatten() for name in names])
        gram += (rows @ rows.T).double()
    for suffix in [n.removeprefix("layers.0.") for n in adapter if n.startswith("layers.0.")]:
        rows = torch.stack([adapter[f"layers.{j}.{suffix}"].flatten() for j in range(base.num_layers)])
        gram += (rows @ rows.T).double()
    norms = gram.diagonal().sqrt().clamp_min(1e-12)
    return (gram / norms[:, None] / norms[None, :]).numpy()


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


def fuse(groups: Groups, *, fusion: str, beta: float) -> Submodel:
    """The submodel with one block per group, as a linear combination of the group's blocks; the anchor a is its first block.

    dblf: theta_a + beta sum_j (theta_j - theta_a), so weights 1 - beta (n - 1) for the anchor and beta for each other block.
    r_one: theta_a. sum: sum_j theta_j.
    """
    layers: list[Combination] = []
    for group in groups:
        anchor, others = group[0], group[1:]
        if fusion == "r_one" or not others:
            layers.append(((anchor, 1.0),))
        elif fusion == "sum":
            layers.append(tuple((j, 1.0) for j in group))
        else:
            layers.append(((anchor, 1.0 - beta * len(others)), *((j, beta) for j in others)))
    return Submodel(tuple(layers))


def _random_labels(num_layers: int, num_groups: int, generator: np.random.Generator) -> np.ndarray:
    """The group of each block, (L,): every group gets one block for certain, the others fall where they may."""
    labels = np.concatenate([np.arange(num_groups), generator.integers(num_groups, size=num_layers - num_groups)])
    return generator.permutation(labels)


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
