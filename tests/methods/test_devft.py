"""DevFT: its stages, its groups, its fusion, and what it saves on the link."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fleetune.errors import UserError
from fleetune.methods.base import Report
from fleetune.methods.devft import DevFT, write_back
from fleetune.methods.layer_groups import fuse
from fleetune.reports.figures.block_groups import block_groups
from support import runs, tiny

FAST = {"evaluation.generate": False}


def test_stages_are_of_equal_length():
    """3 stages (1, 2, 4 blocks) in 6 rounds: two rounds each."""
    method = runs.problem(tiny.spec({"rounds.num_rounds": 6}, method="devft")).method
    assert [method.stage(t) for t in range(6)] == [0, 0, 1, 1, 2, 2]


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
    "setting",
    [
        {"grouping": "random"},
        {"grouping": "even"},
        {"grouping": "strided"},
        {"contiguous": True},
        {"similarity": "adapter"},
        {"fusion": "r_one"},
        {"fusion": "random_one"},
        {"fusion": "sum"},
        {"fusion": "mean"},
    ],
    ids=lambda setting: next(iter(setting)) + "-" + str(next(iter(setting.values()))),
)
def test_the_ablations_run(setting: dict[str, Any]):
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
    [
        ({"method.initial_capacity": 5}, "method.initial_capacity"),
        ({"rounds.num_rounds": 2}, "rounds.num_rounds"),
        ({"method.stage_lengths": [1, 1]}, "method.stage_lengths"),
        ({"method.stage_lengths": [1, 1, 8]}, "method.stage_lengths"),
        ({"method.grouping": "strided", "method.contiguous": True}, "method.grouping"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: dict[str, Any], field: str):
    """Five blocks of four; three stages in two rounds; two lengths for three stages; a stage without a round of three; runs
    of consecutive blocks that are every second block.
    """
    with pytest.raises(UserError) as raised:
        runs.problem(tiny.spec(overrides, method="devft"))
    assert raised.value.field == field


def test_stages_last_as_long_as_they_are_given():
    """Lengths 1, 2, 3 of 12 rounds, in rounds: 2, 4, 6; blocks 1, 2, 4."""
    lengths = {"rounds.num_rounds": 12, "method.stage_lengths": [1, 2, 3]}
    method = runs.problem(tiny.spec(lengths, method="devft")).method
    assert [method.stage(t) for t in range(12)] == [0] * 2 + [1] * 4 + [2] * 6


def test_every_stage_leaves_its_groups_on_record():
    """Three stages of 1, 2, 4 blocks; what moved in the last one is what the adapter changed since the stage began."""
    done = runs.run(tiny.spec(FAST, method="devft"))
    kept = done.run_dir.stages()
    assert [len(kept[stage]["groups"]) for stage in range(3)] == [1, 2, 4]
    for stage in range(3):
        similarity = np.array(kept[stage]["similarity"])
        assert similarity.shape == (4, 4)
        np.testing.assert_allclose(similarity, similarity.T)
        np.testing.assert_allclose(similarity.diagonal(), 1.0)
        assert len(kept[stage]["moved"]) == len(kept[stage]["groups"])
        assert min(kept[stage]["moved"]) > 0
    begun = {n.removeprefix("global."): t for n, t in done.state.tensors.items() if n.startswith("global.")}
    squares = [
        sum(
            float((t - begun[n]).double().square().sum())
            for n, t in done.deployed.adapter.items()
            if n.startswith(f"layers.{j}.")
        )
        for j in range(4)
    ]
    assert kept[2]["moved"] == pytest.approx([square**0.5 for square in squares])
    assert kept[2]["contiguous"]


def test_a_resumed_run_leaves_the_same_records(tmp_path: Path):
    """Stopped after the first stage's last round, before or after its record was written; a record that is damaged is named."""
    spec = tiny.spec(FAST, method="devft")
    whole = runs.run(spec).run_dir.stages()
    runs.run(spec, folder=tmp_path, stop_after=1)
    resumed = runs.run(spec, folder=tmp_path).run_dir
    assert resumed.stages() == whole
    record = resumed.path / "method" / "stage_1.json"
    record.write_bytes(record.read_bytes().replace(b"groups", b"troups"))
    with pytest.raises(UserError, match="stage_1"):
        resumed.stages()


def test_the_groups_are_drawn(tmp_path: Path):
    """As one of the run's figures, which MLflow gets with the others; a method that keeps nothing has no such figure."""
    done = runs.run(tiny.spec(FAST, method="devft"))
    drawn = block_groups(done.run_dir, path=tmp_path / "groups.png")
    assert drawn is not None
    assert drawn.read_bytes().startswith(b"\x89PNG")
    plain = runs.run(tiny.spec({**FAST, "rounds.num_rounds": 1, "evaluation.every": 1}))
    assert plain.run_dir.stages() == {}
    assert block_groups(plain.run_dir, path=tmp_path / "none.png") is None
