"""DevFT's groups and how they become one block each, on matrices small enough to work out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fleetune.methods.layer_groups import GroupSettings, contiguous_groups, fuse, group_layers, spectral_groups
from fleetune.methods.layer_similarity import layer_similarity
from fleetune.methods.stage_record import moved
from fleetune.models.base import BaseModel
from support import runs, tiny


@pytest.mark.parametrize(("size", "beta"), [(1, 0.1), (3, 0.1), (4, 0.15), (11, 0.1)])
def test_fusion_weights_sum_to_one(size: int, beta: float):
    """The anchor is the group's first block with 1 - beta (n - 1), every other has beta."""
    group = list(range(2, 2 + size))
    (combination,) = fuse([group], fusion="dblf", beta=beta).layers
    assert [j for j, _ in combination] == group
    weights = [w for _, w in combination]
    assert sum(weights) == pytest.approx(1.0)
    assert weights[0] == pytest.approx(1 - beta * (size - 1))
    assert weights[1:] == [beta] * (size - 1)


def test_fusion_of_a_group_of_one_is_the_block_itself():
    for fusion in ("dblf", "r_one", "sum"):
        assert fuse([[3]], fusion=fusion, beta=0.1).layers == (((3, 1.0),),)


def test_other_fusions():
    """r_one keeps the first block; sum adds all."""
    assert fuse([[0, 2], [1]], fusion="r_one", beta=0.1).layers == (((0, 1.0),), ((1, 1.0),))
    assert fuse([[0, 2], [1]], fusion="sum", beta=0.1).layers == (((0, 1.0), (2, 1.0)), ((1, 1.0),))


def test_fusing_numbers():
    """theta_a + beta sum_j (theta_j - theta_a) of blocks 1, 2, 6 with beta 0.1: 1 + 0.1 (1 + 5) = 1.6."""
    adapter = {f"layers.{j}.x.lora_A": torch.tensor([v]) for j, v in enumerate([1.0, 2.0, 6.0])}
    fused = fuse([[0, 1, 2]], fusion="dblf", beta=0.1).fuse_adapter(adapter)
    assert list(fused) == ["layers.0.x.lora_A"]
    assert fused["layers.0.x.lora_A"].item() == pytest.approx(1.6)
    assert adapter["layers.0.x.lora_A"].item() == 1.0


@pytest.mark.parametrize("laplacian", ["unnormalised", "normalised"])
def test_groups_of_a_block_diagonal_similarity_are_its_blocks(laplacian: str):
    """Nothing is similar across the blocks {0, 2, 5}, {1, 4} and {3}, so every k-means seed finds them."""
    blocks = [[0, 2, 5], [1, 4], [3]]
    similarity = np.zeros((6, 6))
    for block in blocks:
        similarity[np.ix_(block, block)] = 0.8
    np.fill_diagonal(similarity, 1.0)
    for seed in range(10):
        assert spectral_groups(similarity, 3, laplacian=laplacian, seed=seed) == blocks


def test_similarity_is_the_cosine_of_whole_blocks():
    """Two tensors per block and an adapter: the cosine of the flattened concatenation, all three together."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{j}.{n}.weight": torch.randn(3, 2, generator=generator) for j in range(4) for n in ("p", "q")
    }
    adapter = {f"layers.{j}.p.lora_A": torch.randn(5, generator=generator) for j in range(4)}
    base = BaseModel("four", {"num_hidden_layers": 4}, {**weights, "model.norm.weight": torch.ones(9)}, "none", "")
    flat = [
        torch.cat([*(weights[f"model.layers.{j}.{n}.weight"].flatten() for n in "pq"), adapter[f"layers.{j}.p.lora_A"]])
        for j in range(4)
    ]
    expected = torch.nn.functional.cosine_similarity(torch.stack(flat)[:, None], torch.stack(flat)[None], dim=2)
    np.testing.assert_allclose(layer_similarity(base, adapter), expected.numpy(), atol=1e-6)


def test_coinciding_blocks_still_fill_every_group():
    """k-means merges points that coincide; groups are split until none is empty."""
    groups = spectral_groups(np.ones((6, 6)), 4, laplacian="normalised", seed=0)
    assert len(groups) == 4
    assert sorted(j for group in groups for j in group) == list(range(6))


@pytest.mark.parametrize("grouping", ["random", "even", "strided", "dglg"])
def test_groupings_are_partitions_in_order_of_their_first_block(grouping: str):
    base = runs.base_model(tiny.model_folder(8), "none")
    settings = GroupSettings(name="devft", grouping=grouping)
    for stage, num_groups in enumerate((1, 2, 5, 8)):
        groups = group_layers(base, {}, num_groups, settings, run_seed=0, stage=stage)
        assert sorted(j for group in groups for j in group) == list(range(8))
        assert len(groups) == num_groups
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)
        assert all(group == sorted(group) for group in groups)
    if grouping == "even":
        assert group_layers(base, {}, 2, settings, run_seed=0, stage=0) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("grouping", ["random", "even", "dglg"])
def test_contiguous_groups_are_runs(grouping: str):
    base = runs.base_model(tiny.model_folder(8), "none")
    settings = GroupSettings(name="devft", grouping=grouping, contiguous=True)
    for stage, num_groups in enumerate((1, 2, 5, 8)):
        groups = group_layers(base, {}, num_groups, settings, run_seed=0, stage=stage)
        assert [j for group in groups for j in group] == list(range(8))
        assert len(groups) == num_groups
        assert all(groups)


def test_strided_groups_take_every_kth_block():
    base = runs.base_model(tiny.model_folder(8), "none")
    settings = GroupSettings(name="devft", grouping="strided")
    assert group_layers(base, {}, 3, settings, run_seed=0, stage=0) == [[0, 3, 6], [1, 4, 7], [2, 5]]


def symmetric(num_layers: int, others: float, pairs: dict[tuple[int, int], float]) -> np.ndarray:
    """W with 1 on the diagonal, the given similarities, and one value for all other pairs."""
    matrix = np.full((num_layers, num_layers), others)
    for (a, b), value in pairs.items():
        matrix[a, b] = matrix[b, a] = value
    np.fill_diagonal(matrix, 1.0)
    return matrix


@pytest.mark.parametrize("laplacian", ["unnormalised", "normalised"])
def test_runs_that_belong_together_stay_together(laplacian: str):
    """Blocks 0, 1 and blocks 2, 3 are alike. Ratio cut after block 1: 0.4 / 2 + 0.4 / 2 = 0.4; after 0: 1.1 + 1.1 / 3 = 1.47."""
    similarity = symmetric(4, 0.1, {(0, 1): 0.9, (2, 3): 0.9})
    assert contiguous_groups(similarity, 2, laplacian=laplacian) == [[0, 1], [2, 3]]


def test_where_alternate_blocks_are_alike_spectral_groups_alternate_and_runs_do_not():
    """Blocks 0, 2 and blocks 1, 3 are alike (0.9), 0 and 1 a little (0.2), others are not (0.1).

    Ratio cuts of two runs: after block 0: (0.2 + 0.9 + 0.1) (1 + 1/3) = 1.6; after 1: (0.9 + 0.1 + 0.1 + 0.9) (1/2 + 1/2) = 2;
    after 2: (0.1 + 0.9 + 0.1) (1/3 + 1) = 1.47, the least.
    """
    similarity = symmetric(4, 0.1, {(0, 2): 0.9, (1, 3): 0.9, (0, 1): 0.2})
    assert spectral_groups(similarity, 2, laplacian="unnormalised", seed=0) == [[0, 2], [1, 3]]
    assert contiguous_groups(similarity, 2, laplacian="unnormalised") == [[0, 1, 2], [3]]


def test_the_normalised_cut_divides_by_degrees():
    """Three blocks; similarities 0-1: 0.5, 1-2: 0.4, 0-2: 0. Degrees 1.5, 1.9, 1.4, with the diagonal.

    Ratio cut: after 0: 0.5 (1 + 1/2) = 0.75; after 1: 0.4 (1/2 + 1) = 0.6. Normalised: after 0: 0.5 (1/1.5 + 1/3.3) = 0.485;
    after 1: 0.4 (1/3.4 + 1/1.4) = 0.403.
    """
    similarity = symmetric(3, 0.0, {(0, 1): 0.5, (1, 2): 0.4})
    for laplacian in ("unnormalised", "normalised"):
        assert contiguous_groups(similarity, 2, laplacian=laplacian) == [[0, 1], [2]]


@pytest.mark.parametrize("laplacian", ["unnormalised", "normalised"])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 6, 7])
def test_no_other_runs_cut_less(laplacian: str, num_groups: int):
    """All ways to cut seven blocks into so many runs, one by one."""
    generator = np.random.default_rng(num_groups)
    half = generator.uniform(0, 1, (7, 7))
    similarity = (half + half.T) / 2
    np.fill_diagonal(similarity, 1.0)

    def cost(groups: list[list[int]]) -> float:
        total = 0.0
        for group in groups:
            others = [j for j in range(7) if j not in group]
            size = similarity[group].sum() if laplacian == "normalised" else len(group)
            total += similarity[np.ix_(group, others)].sum() / size
        return total

    borders = ([0, *inner, 7] for inner in itertools.combinations(range(1, 7), num_groups - 1))
    every = [[list(range(a, b)) for a, b in itertools.pairwise(border)] for border in borders]
    found = contiguous_groups(similarity, num_groups, laplacian=laplacian)
    assert cost(found) == pytest.approx(min(cost(groups) for groups in every), abs=1e-6)


def test_similarity_of_base_or_adapter_alone():
    """Blocks 0 and 1: weights (1, 0), (1, 0), adapters (1, 0), (0, 1). Cosines: base 1, adapter 0, both (1 + 0) / 2."""
    weights = {f"model.layers.{j}.p.weight": torch.tensor([[1.0, 0.0]]) for j in range(2)}
    base = BaseModel("two", {"num_hidden_layers": 2}, weights, "none", "")
    adapter = {"layers.0.p.lora_A": torch.tensor([1.0, 0.0]), "layers.1.p.lora_A": torch.tensor([0.0, 1.0])}
    found = {source: layer_similarity(base, adapter, source)[0, 1] for source in ("base", "adapter", "both")}
    assert found == pytest.approx({"base": 1.0, "adapter": 0.0, "both": 0.5})


def test_the_mean_is_dblf_with_one_over_n():
    """Four blocks: weights 1/4 each; 1 - 3/4 for the first and 1/4 for the others."""
    (mean,) = fuse([[0, 1, 2, 3]], fusion="mean", beta=0.1).layers
    (dblf,) = fuse([[0, 1, 2, 3]], fusion="dblf", beta=0.25).layers
    assert mean == dblf == ((0, 0.25), (1, 0.25), (2, 0.25), (3, 0.25))


def test_a_random_one_is_one_of_the_group_and_the_seed_decides_which():
    chosen = set()
    for seed in range(20):
        (combination,) = fuse([[1, 2, 5]], fusion="random_one", beta=0.1, run_seed=seed).layers
        assert fuse([[1, 2, 5]], fusion="random_one", beta=0.1, run_seed=seed).layers == (combination,)
        ((block, weight),) = combination
        assert weight == 1.0
        chosen.add(block)
    assert chosen == {1, 2, 5}


def test_how_far_a_group_moved():
    """Group 0: A by (3, 0), B by (0, 4): the norm of both together is 5. Group 1 stood still; tensors of another shape do not
    count, nor do those that were not there.
    """
    begun = {
        "layers.0.x.lora_A": torch.zeros(2),
        "layers.0.x.lora_B": torch.zeros(2),
        "layers.1.x.lora_A": torch.ones(2),
        "layers.1.x.lora_B": torch.ones(3),
    }
    now = {
        "layers.0.x.lora_A": torch.tensor([3.0, 0.0]),
        "layers.0.x.lora_B": torch.tensor([0.0, 4.0]),
        "layers.1.x.lora_A": torch.ones(2),
        "layers.1.x.lora_B": torch.zeros(2),
        "layers.1.y.lora_A": torch.ones(2),
    }
    assert moved(begun, now, 2) == [5.0, 0.0]
