"""Budgets: who is refused, for what, and what would fit; and clients that adapt until their work fits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fleetune.engine.round.ranks import filled, overlay, weight_per_row
from fleetune.engine.round.workload import Workload
from fleetune.errors import UserError
from fleetune.fleet.budgets import BudgetsConfig, build_budgets
from fleetune.fleet.devices import device
from fleetune.models.adapters import cut
from support import runs, tiny

FAST = {"evaluation.generate": False}
NANO, ORIN = device("jetson-nano"), device("jetson-agx-orin-64gb")
FULL = Workload(batch_size=8, rank=4, depth=6, checkpointing=False)
LLAMA = {"cost.model": "llama2-7b", "cost.weights": "nf4", "cost.precision": "bf16"}


def needs(**columns: list[float]) -> dict[str, np.ndarray]:
    """Three turns that need next to nothing but for these columns."""
    names = ("peak_memory_bytes", "sim_seconds", "energy_joules", "downlink_bytes", "uplink_bytes")
    return {name: np.array(columns.get(name, [1.0] * 3)) for name in names}


def test_budgets_hold_for_all_or_by_device():
    """Memory is the device's own unless the job says otherwise, all else unlimited."""
    own = build_budgets(BudgetsConfig(), (NANO, ORIN))
    assert own.memory_bytes.tolist() == [NANO.budget_bytes, ORIN.budget_bytes]
    assert np.isinf([own.seconds, own.joules, own.bytes]).all()
    some = build_budgets(BudgetsConfig(memory_bytes={"jetson-nano": 1e9}, joules_per_round=50.0), (NANO, ORIN))
    assert some.memory_bytes.tolist() == [1e9, ORIN.budget_bytes]
    assert some.joules.tolist() == [50.0, 50.0]


def test_a_broken_budget_is_named_memory_before_all():
    """Bytes count both ways: 60 up and 60 down break a budget of 100. What equals the budget fits."""
    budgets = build_budgets(
        BudgetsConfig(memory_bytes=10.0, seconds_per_round=5.0, joules_per_round=5.0, bytes_per_round=100.0), (NANO,)
    )
    nanos = np.zeros(3, int)
    assert budgets.broken(nanos, needs(sim_seconds=[5, 6, 5])).tolist() == [None, "seconds", None]
    assert budgets.broken(nanos, needs(energy_joules=[9, 1, 1])).tolist() == ["joules", None, None]
    both = needs(uplink_bytes=[60, 60, 0], downlink_bytes=[40, 60, 101])
    assert budgets.broken(nanos, both).tolist() == [None, "bytes", "bytes"]
    assert budgets.broken(nanos, needs(sim_seconds=[6] * 3, peak_memory_bytes=[11, 10, 9])).tolist() == [
        "memory",
        "seconds",
        "seconds",
    ]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("fleet.budgets.memory_bytes", 0, r"fleet.budgets.memory_bytes=0.0: must be greater than 0"),
        ("fleet.budgets.joules_per_round", -3, "must be greater than 0"),
        (
            "fleet.budgets.seconds_per_round",
            {"jetson-nano": -1},
            r"seconds_per_round.jetson-nano=-1.0: must be greater",
        ),
        ("fleet.budgets.bytes_per_round", {"jetson-nanoo": 1}, "did you mean 'jetson-nano'"),
        ("fleet.budgets.watts", 1, "unknown field"),
        ("fleet.adapt", "shrink", "'none', 'batch', 'checkpointing', 'capacity' or 'rank'"),
    ],
)
def test_a_wrong_budget_is_refused_with_the_rule(field: str, value: Any, rule: str):
    with pytest.raises(UserError, match=rule):
        tiny.spec({field: value})


@pytest.mark.parametrize(
    ("kind", "sizes"), [("batch", [4, 2, 1]), ("rank", [2, 1]), ("capacity", [3, 1]), ("checkpointing", [True])]
)
def test_a_ladder_goes_down_by_halves(kind: str, sizes: list[Any]):
    field = {"batch": "batch_size", "rank": "rank", "capacity": "depth", "checkpointing": "checkpointing"}[kind]
    steps = list(FULL.ladder(kind))
    assert [getattr(workload, field) for workload in steps] == sizes
    assert len({workload.reduction(FULL) for workload in steps}) == len(steps)


def test_smaller_workloads_are_put_in_words():
    texts = [workload.reduction(FULL) for kind in ("capacity", "rank") for workload in FULL.ladder(kind)]
    assert texts == ["a submodel of 3 blocks", "a submodel of 1 block", "rank 2", "rank 1"]


def test_a_client_over_another_budget_is_refused_and_costs_nothing():
    """The slower boards need more than a twentieth of a second: they are told what would fit, the round goes on."""
    plain = runs.run(tiny.spec(FAST)).clients
    limit = float(plain.groupby("device")["sim_seconds"].min()["jetson-nano"]) * 0.999
    done = runs.run(tiny.spec({**FAST, "fleet.budgets": {"seconds_per_round": limit}}))
    clients = done.clients
    refused = clients["status"] == "refused"
    assert (refused == (plain["sim_seconds"] > limit)).all()
    assert set(clients["device"][refused]) == {"jetson-nano"}
    assert set(clients["refused_by"][refused]) == {"seconds"}
    assert clients["refused_hint"][refused].str.len().min() > 0
    assert clients["refused_by"][~refused].isna().all()
    assert not clients.loc[refused, ["flops", "sim_seconds", "energy_joules", "uplink_bytes"]].to_numpy().any()
    assert done.rounds["num_refused"].tolist() == refused.groupby(clients["round"]).sum().tolist()
    assert done.events[-1]["totals"]["num_refused"] == refused.sum()


def test_a_hint_names_what_fits():
    """LLaMA2-7B in NF4: a Nano holds DevFT's first stage and not its last; what the hint says is then tried, and fits."""
    tight = {**FAST, **LLAMA, "fleet.devices": {"jetson-nano": 1.0}}
    plain = runs.run(tiny.spec(tight, method="devft")).clients
    assert (plain["status"] == "oom").groupby(plain["round"]).mean().tolist() == [0.0, 0.0, 1.0]
    refused = plain[plain["status"] == "oom"]
    assert set(refused["refused_hint"]) == {"a submodel of 2 blocks"}
    adapted = runs.run(tiny.spec({**tight, "fleet.adapt": "capacity"}, method="devft")).clients
    assert (adapted["status"] == "ok").all()
    where = adapted.loc[refused.index]
    assert (where["depth"] == 2).all()
    assert (where["peak_memory_bytes"] <= where["budget_bytes"]).all()


def test_where_nothing_fits_that_is_said():
    done = runs.run(tiny.spec({**FAST, "fleet.budgets": {"memory_bytes": 1000.0}, "fleet.adapt": "batch"}))
    assert (done.clients["status"] == "oom").all()
    assert set(done.clients["refused_hint"]) == {"nothing smaller"}
    assert (done.clients["batch_size"] == 2).all()


@functools.cache
def plain_run(method: str, initial_capacity: int | None) -> runs.Finished:
    """The tiny run in which nobody has a budget."""
    return runs.run(tiny.spec({**FAST, **stages(initial_capacity)}, method=method))


def stages(initial_capacity: int | None) -> dict[str, Any]:
    return {} if initial_capacity is None else {"method.initial_capacity": initial_capacity}


def adapting(adapt: str, method: str, **overrides: Any) -> Any:
    """The tiny run with a budget for nanos that none of them keeps: bytes, which a rank halves, or memory."""
    capacity = 2 if method == "devft" else None
    clients = plain_run(method, capacity).clients
    if adapt == "rank":
        budgets = {"bytes_per_round": {"jetson-nano": float(clients["uplink_bytes"].max())}}
    else:
        budgets = {"memory_bytes": {"jetson-nano": 0.999 * float(clients["peak_memory_bytes"].min())}}
    changes = {**FAST, **stages(capacity), "fleet.budgets": budgets, "fleet.adapt": adapt}
    return tiny.spec({**changes, **overrides}, method=method)


CASES = [
    ("batch", "fedit", "batch_size", 1),
    ("checkpointing", "fedit", "checkpointing", True),
    ("checkpointing", "split-lora", "checkpointing", True),
    ("rank", "fedprox", "rank", 1),
    ("rank", "fedsa-lora", "rank", 1),
    ("rank", "adalora", "rank", 1),
    ("capacity", "devft", "depth", 1),
]


@pytest.mark.parametrize(("adapt", "method", "column", "smaller"), CASES)
def test_clients_that_adapt_take_part_with_less(adapt: str, method: str, column: str, smaller: Any, tmp_path: Path):
    """Every nano shrinks one thing and is not refused, the others do all; a stopped run goes on to the same bits."""
    spec = adapting(adapt, method)
    refusing = runs.run(spec.model_copy(update={"fleet": spec.fleet.model_copy(update={"adapt": "none"})}))
    hit = refusing.clients["status"].isin(["oom", "refused"])
    assert 0 < hit.sum() < len(hit)
    done = runs.run(spec)
    clients = done.clients
    assert (clients["status"] == "ok").all()
    assert clients.loc[hit, column].isin([smaller, 2 * smaller]).all()
    assert (clients.loc[hit, column] != refusing.clients.loc[hit, column]).all()
    assert (clients.loc[~hit, column] == refusing.clients.loc[~hit, column]).all()
    assert np.isfinite(clients["train_loss"]).all()
    assert (clients["peak_memory_bytes"] <= clients["budget_bytes"]).all()
    runs.run(spec, folder=tmp_path, stop_after=1)
    runs.same_runs(runs.run(spec, folder=tmp_path), done)


@pytest.mark.parametrize("method", ["fedit", "split-lora"])
def test_checkpointing_changes_costs_and_nothing_else(method: str):
    plain, done = plain_run(method, None), runs.run(adapting("checkpointing", method))
    runs.same_tensors(done.state.tensors, plain.state.tensors)
    own = done.clients["checkpointing"]
    assert (done.clients["flops"][own] > plain.clients["flops"][own]).all()
    assert (done.clients["peak_memory_bytes"][own] < plain.clients["peak_memory_bytes"][own]).all()
    assert (done.clients["flops"][~own] == plain.clients["flops"][~own]).all()


@pytest.mark.parametrize(("adapt", "method", "column", "smaller"), CASES)
def test_adapting_clients_are_charged_for_what_they_pass(adapt: str, method: str, column: str, smaller: Any):
    """Bytes on the bill are those of the smaller tensors, tokens those of the smaller batches."""
    done, passed = runs.recorded(adapting(adapt, method))
    table = done.clients.set_index(["round", "client_id"])
    for one in passed:
        for cohort in one.unit.cohorts:
            for i in range(cohort.start, cohort.stop):
                row = table.loc[(one.unit.round_idx + 1, one.reply.client_ids[i])]
                sent = sum(t.nbytes for t in one.payloads[cohort.payload].tensors.values())
                assert row["downlink_bytes"] == sent + one.reply.cut_bytes[1, i]
                assert row["uplink_bytes"] == one.reply.upload_bytes[i] + one.reply.cut_bytes[0, i]
                assert row["num_tokens"] == one.reply.num_tokens[i]
    assert len(table) == 9


@pytest.mark.parametrize("cohort", [1, 3])
def test_who_stands_in_a_cohort_does_not_matter(cohort: int):
    """Clients of unequal ranks or batches never share a stack, so stacked and alone agree as they always do.

    By SGD: AdamW divides by the gradient's own size, and makes a visible step out of what a rounding leaves of a zero.
    """
    sgd = {"local.optimizer": "sgd", "local.learning_rate": 0.5}
    for adapt, method in (("rank", "fedit"), ("batch", "fedit")):
        runs.close_tensors(
            runs.run(adapting(adapt, method, **sgd, **{"execution.cohort": cohort})).state.tensors,
            runs.run(adapting(adapt, method, **sgd)).state.tensors,
            rtol=1e-5,
            atol=1e-6,
        )


def pair(a: list[list[float]], b: list[list[float]]) -> dict[str, torch.Tensor]:
    return {"x.lora_A": torch.tensor(a), "x.lora_B": torch.tensor(b)}


def test_rank_rows_are_averaged_over_those_that_trained_them():
    """Client 1 (weight 1/4) trained rank 1, client 2 (weight 3/4) rank 2, nobody the third row.

    Row 0: 1/4 · 4 + 3/4 · 8 = 7. Row 1: client 2's alone, 5. Row 2: as it was sent, 9.
    """
    weights, ranks = np.array([0.25, 0.75]), np.array([1, 2])
    sent = pair([[0.0], [0.0], [9.0]], [[0.0, 0.0, 9.0]])
    trained = weight_per_row(ranks, weights, 3)
    assert trained.tolist() == [1.0, 0.75, 0.0]
    uploads = [pair([[4.0]], [[4.0]]), pair([[8.0], [5.0]], [[8.0, 5.0]])]
    total = {name: torch.zeros_like(tensor) for name, tensor in sent.items()}
    for upload, weight in zip(uploads, weights, strict=True):
        for name, tensor in filled(upload, sent, total_weight=1.0, trained=trained).items():
            total[name] += weight * tensor
    assert total["x.lora_A"].flatten().tolist() == [7.0, 5.0, 9.0]
    assert total["x.lora_B"].flatten().tolist() == [7.0, 5.0, 9.0]
    summed = {name: 0.75 * tensor for name, tensor in uploads[1].items()}  # a partial sum has its weights inside
    inside = filled(summed, sent, total_weight=0.75, trained=trained)["x.lora_A"].flatten().tolist()
    assert inside == pytest.approx([6.0, 5.0, 0.75 * 9.0])


def test_a_third_factor_is_averaged_row_by_row_too():
    """E (r,) has its ranks on its one axis. Weights as above: 1/4 · 4 + 3/4 · 8 = 7, 5 of client 2, and 9 as it was sent."""
    sent = {"x.lora_E": torch.tensor([0.0, 0.0, 9.0])}
    uploads = [{"x.lora_E": torch.tensor([4.0])}, {"x.lora_E": torch.tensor([8.0, 5.0])}]
    trained = weight_per_row(np.array([1, 2]), np.array([0.25, 0.75]), 3)
    parts = [filled(upload, sent, total_weight=1.0, trained=trained)["x.lora_E"] for upload in uploads]
    assert (0.25 * parts[0] + 0.75 * parts[1]).tolist() == [7.0, 5.0, 9.0]


def test_what_is_kept_at_a_smaller_rank_lies_over_what_was_there():
    kept = overlay(cut(pair([[1.0], [2.0]], [[1.0, 2.0]]), 1), pair([[5.0], [6.0]], [[5.0, 6.0]]), 2)
    assert kept["x.lora_A"].flatten().tolist() == [1.0, 6.0]
    assert overlay({"x.lora_B": torch.tensor([[3.0]])}, {}, 2)["x.lora_B"].tolist() == [[3.0, 0.0]]


def test_a_smaller_rank_leaves_the_ranks_it_does_not_train(tmp_path: Path):
    """All are nanos of rank 1 of 2: the second row of every A stays that of the fresh adapter, but for rounding."""
    spec = adapting("rank", "fedit", **{"fleet.devices": {"jetson-nano": 1.0}})
    done = runs.run(spec)
    fresh = done.problem.method.start().tensors
    for name, tensor in done.state.tensors.items():
        axis = 0 if name.endswith("lora_A") else 1
        torch.testing.assert_close(tensor.select(axis, 1), fresh[name].select(axis, 1), rtol=1e-6, atol=0.0)
    assert not torch.equal(done.state.tensors[name], fresh[name])


def test_a_merged_submodel_writes_back_to_all_of_its_groups():
    """Devices that hold one block of DevFT's stage of two: what they learn goes to both of its blocks."""
    spec = adapting("capacity", "devft", **{"fleet.devices": {"jetson-nano": 1.0}})
    spec = spec.model_copy(update={"rounds": spec.rounds.model_copy(update={"num_rounds": 2})})
    done = runs.run(spec, stop_after=1)
    stage = {name: t for name, t in done.state.tensors.items() if name.startswith("stage.")}
    for name, tensor in stage.items():
        if ".layers.0." in name:
            assert torch.equal(tensor, stage[name.replace(".layers.0.", ".layers.1.")])


@pytest.mark.parametrize(
    ("adapt", "method", "rule"),
    [
        ("capacity", "fedit", "fedit has no submodels of fewer blocks .methods that have: devft"),
        ("rank", "c2a", "c2a has no adapters with ranks"),
        ("rank", "split-lora", "works on all clients of a round at once"),
        ("batch", "split-lora", "method.server=per_client"),
    ],
)
def test_a_method_that_cannot_do_with_it_refuses_to_start(adapt: str, method: str, rule: str):
    spec = tiny.spec({**FAST, "fleet.adapt": adapt}, method=method)
    with pytest.raises(UserError, match=rule):
        runs.problem(spec)
