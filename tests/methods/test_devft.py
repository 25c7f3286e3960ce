"""DevFT: its stages, its groups, its fusion, and what it saves on the link."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fleetune.errors import UserError
from fleetune.methods.base import Report
from fleetune.methods.devft import DevFT, capacities, write_back
from fleetune.methods.layer_groups import fuse, group_layers, layer_similarity, spectral_groups
from fleetune.models.base import BaseModel
from support import runs, tiny

FAST = {"evaluation.generate": False}


@pytest.mark.parametrize(
    ("initial", "growth_rate", "num_layers", "expected"),
    [
        (4, 2, 32, [4, 8, 16, 32]),
        (5, 2, 40, [5, 10, 20, 40]),
        (4, 4, 32, [4, 16, 32]),
        (4, 8, 32, [4, 32]),
        (5, 4, 40, [5, 20, 40]),
        (5, 8, 40, [5, 40]),
        (1, 2, 32, [1, 2, 4, 8, 16, 32]),
        (32, 2, 32, [32]),
    ],
)
def test_capacities_of_the_papers_settings(initial: int, growth_rate: int, num_layers: int, expected: list[int]):
    assert capacities(initial, growth_rate, num_layers) == expected


def test_stages_are_of_equal_length():
    """3 stages (1, 2, 4 blocks) in 6 rounds: two rounds each."""
    method = runs.problem(tiny.spec({"rounds.num_rounds": 6}, method="devft")).method
    assert [method.stage(t) for t in range(6)] == [0, 0, 1, 1, 2, 2]


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


@pytest.mark.parametrize("grouping", ["random", "even", "dglg"])
def test_groupings_are_partitions_in_order_of_their_first_block(grouping: str):
    base = runs.base_model(tiny.model_folder(8), "none")
    for stage, num_groups in enumerate((1, 2, 5, 8)):
        groups = group_layers(
            base, {}, num_groups, grouping=grouping, laplacian="unnormalised", run_seed=0, stage=stage
        )
        assert sorted(j for group in groups for j in group) == list(range(8))
        assert len(groups) == num_groups
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)
        assert all(group == sorted(group) for group in groups)
    if grouping == "even":
        assert group_layers(base, {}, 2, grouping="even", laplacian="unnormalised", run_seed=0, stage=0) == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
        ]


def test_write_back_gives_every_block_the_adapter_of_its_group():
    adapter = {"layers.0.x.lora_A": torch.tensor([1.0]), "layers.1.x.lora_A": torch.tensor([2.0])}
    whole = write_back(adapter, [[0, 3], [1, 2]])
    assert {name: t.item() for name, t in whole.items()} == {
        "layers.0.x.lora_A": 1.0,
        "layers.1.x.lora_A": 2.0,
        "layers.2.x.lora_A": 2.0,
        "layers.3.x.lora_A": 1.0,
    }
    whole["layers.3.x.lora_A"].zero_()
    assert whole["layers.0.x.lora_A"].item() == 1.0


def test_nested_groups_leave_the_adapter_unchanged():
    """Written back to {0, 1, 2, 3}, then fused over {0, 2} and {1, 3}: equal adapters fuse into themselves."""
    adapter = {"layers.0.x.lora_A": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}
    whole = write_back(adapter, [[0, 1, 2, 3]])
    fused = fuse([[0, 2], [1, 3]], fusion="dblf", beta=0.15).fuse_adapter(whole)
    for n in range(2):
        torch.testing.assert_close(fused[f"layers.{n}.x.lora_A"], adapter["layers.0.x.lora_A"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inner", ["fedit", "fedsa-lora"])
def test_the_whole_model_at_once_is_the_inner_method(inner: str):
    """One stage of all four blocks: nothing is fused, so every bit is the inner method's."""
    whole = {**FAST, "method.initial_capacity": 4, "method.aggregation": inner}
    devft, plain = runs.run(tiny.spec(whole, method="devft")), runs.run(tiny.spec(FAST, method=inner))
    runs.same_tensors(devft.deployed.adapter, plain.deployed.adapter)
    assert devft.rounds["train_loss"].tolist() == plain.rounds["train_loss"].tolist()
    assert devft.rounds["eval_loss"].iloc[-1] == plain.rounds["eval_loss"].iloc[-1]
    assert devft.clients["uplink_bytes"].tolist() == plain.clients["uplink_bytes"].tolist()


@pytest.mark.parametrize("inner", ["fedit", "fedsa-lora"])
def test_four_doubling_stages_send_15_32_of_the_inner_method(inner: str):
    """(1 + 2 + 4 + 8) / (4 * 8) = 15/32, the paper's x 2.13, exactly."""
    eight = {**FAST, "model.base": tiny.model_folder(8), "rounds.num_rounds": 4, "evaluation.every": 4}
    devft = runs.run(tiny.spec({**eight, "method.aggregation": inner}, method="devft"))
    plain = runs.run(tiny.spec(eight, method=inner))
    assert devft.rounds["depth"].tolist() == [1, 2, 4, 8]
    assert devft.rounds["stage"].tolist() == [0, 1, 2, 3]
    for name in ("uplink_bytes", "downlink_bytes"):
        assert 32 * devft.rounds[name].sum() == 15 * plain.rounds[name].sum()
    assert (devft.rounds["num_ok"] == 3).all()


@pytest.mark.parametrize(
    "setting", [{"grouping": "random"}, {"grouping": "even"}, {"fusion": "r_one"}, {"fusion": "sum"}]
)
def test_the_ablations_run(setting: dict[str, str]):
    done = runs.run(tiny.spec({**FAST, **{f"method.{k}": v for k, v in setting.items()}}, method="devft"))
    assert np.isfinite(done.rounds["eval_loss"].iloc[-1])
    assert done.rounds["depth"].tolist() == [1, 2, 4]
    assert set(done.deployed.adapter) == set(done.problem.method.context.fresh_adapter())


def test_a_stage_starts_from_what_the_last_one_wrote_back():
    """Round 1 begins with the fusion of the write-back of round 0, by the groups of the checkpoint."""
    spec = tiny.spec(FAST, method="devft")
    first = runs.run(spec, stop_after=1)
    method = first.problem.method
    assert isinstance(method, DevFT)
    stage_0 = {n.removeprefix("stage."): t for n, t in first.state.tensors.items() if n.startswith("stage.")}
    begun = method.begin_round(first.state, 1, Report(0.0))
    whole = write_back(stage_0, first.state.values["groups"])
    expected = fuse(begun.values["groups"], fusion="dblf", beta=0.1).fuse_adapter(whole)
    stage_1 = {n.removeprefix("stage."): t for n, t in begun.tensors.items() if n.startswith("stage.")}
    assert len(first.state.values["groups"]) == 1
    assert len(begun.values["groups"]) == 2
    runs.same_tensors(stage_1, expected)


def test_shipping_the_submodel_is_charged_once_per_stage_and_client():
    """Devices that do not hold the base download the stage's fp32 blocks when they first see the stage, and not again."""
    shipped = {**FAST, "rounds.num_rounds": 6, "method.ship_submodel": True, "fleet.num_clients": 3}
    done = runs.run(tiny.spec(shipped, method="devft"))
    free = runs.run(tiny.spec({**shipped, "method.ship_submodel": False}, method="devft"))
    extra = (done.rounds["downlink_bytes"] - free.rounds["downlink_bytes"]).tolist()
    block = 4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert extra == [3 * block, 0, 3 * 2 * block, 0, 3 * 4 * block, 0]
    runs.same_tensors(done.state.tensors, free.state.tensors)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [({"method.initial_capacity": 5}, "method.initial_capacity"), ({"rounds.num_rounds": 2}, "rounds.num_rounds")],
)
def test_what_does_not_fit_is_refused(overrides: dict[str, int], field: str):
    """Five blocks of four; three stages in two rounds."""
    with pytest.raises(UserError) as raised:
        runs.problem(tiny.spec(overrides, method="devft"))
    assert raised.value.field == field
