"""Costs from a trace: closed forms and published numbers beside it, and seconds, joules and bytes by hand."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from fleetune.cost.estimate import CostTable, Load, Traffic, estimate
from fleetune.cost.polynomials import NUM, monomials
from fleetune.cost.trace import PARTS, SideWork, StepTrace
from fleetune.errors import UserError
from fleetune.fleet.devices import device
from fleetune.fleet.fleet import FleetConfig, build_fleet
from fleetune.models.architectures import ARCHITECTURES, ModelShape, architecture
from fleetune.models.config import LINEAR_NAMES
from fleetune.pricing.fit import fitted_devices, fitted_fraction
from fleetune.pricing.published import FITTED, HELD_OUT, MEASUREMENTS, QV, SAME_SOURCE
from fleetune.pricing.validation import CHUNKED_LOGITS, lora_step, medians, rows, table
from support import REPOSITORY, closed_forms


def polynomial(**coefficients: float) -> np.ndarray:
    """Of the basis 1, B, S, BS, BSS, M, R, BR, BRR."""
    names = ("one", "B", "S", "BS", "BSS", "M", "R", "BR", "BRR")
    return np.array([coefficients.get(name, 0.0) for name in names])


def side(*products: tuple[int, np.ndarray, np.ndarray], moved: np.ndarray, num_ops: int = 0) -> SideWork:
    """Operators as (count, FLOPs, bytes)."""
    return SideWork(
        products=np.array([(flops, moved) for _, flops, moved in products]).reshape(-1, 2, NUM),
        counts=np.array([count for count, _, _ in products], float),
        names=("mm",) * len(products),
        moved=moved,
        num_ops=num_ops,
    )


def by_hand(server: SideWork | None = None) -> StepTrace:
    """A step of 3 products of 1e9 BS FLOPs and 1e6 bytes each, 2e6 bytes besides, 10 kernels; 1 GB, or 4 MB per token more."""
    moments = np.zeros((1, len(PARTS), NUM))
    moments[0, PARTS.index("weights")] = polynomial(one=1e9)
    moments[0, PARTS.index("saved")] = polynomial(BS=4e6)
    client = side((3, polynomial(BS=1e9), polynomial(one=1e6)), moved=polynomial(one=2e6), num_ops=10)
    nothing = side(moved=np.zeros(NUM))
    return StepTrace(client, server or nothing, moments, polynomial(BS=4e6), np.zeros((2, NUM)), np.zeros(2))


def cost_of(trace: StepTrace, devices: tuple[str, ...] = ("jetson-agx-orin-64gb",), **changes: Any) -> CostTable:
    """One client per device: 10 steps of 2 x 64 tokens with 40 logits, 1 MB each way at 8 Mbit/s, no latency, fp32."""
    links = {"downlink_bytes": 1e6, "uplink_bytes": 1e6, "down_bps": 8e6, "up_bps": 8e6, "latency_seconds": 0.0}
    links |= {field.name: changes.pop(field.name) for field in fields(Traffic) if field.name in changes}
    rest = {"precision": "fp32", "load": Load.equal(np.full(len(devices), 10), 2, 64, 40), **changes}
    profiles = [device(name) for name in devices]
    return estimate(trace, traffic=Traffic(**links), devices=profiles, device_index=np.arange(len(profiles)), **rest)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.2-3b", 3_212_749_824),
        ("qwen2-7b", 7_615_616_512),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen3-8b", 8_190_735_360),
        ("tinyllama-1.1b", 1_100_048_384),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_parameter_counts_equal_the_published_totals(name, published):
    assert architecture(name).num_params() == published
    assert len(ARCHITECTURES) == 11


def test_a_submodel_of_four_blocks_has_the_tables_and_four_blocks():
    """LLaMA2-7B: 2 x 131,072,000 in the tables, 202,383,360 per block, 4096 in the last norm."""
    assert architecture("llama2-7b").num_params(4) == 2 * 131_072_000 + 4 * 202_383_360 + 4096


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "modules", [QV, LINEAR_NAMES, ("o_proj", "down_proj"), ("gate_proj", "up_proj"), ("down_proj",)]
)
def test_traced_flops_equal_the_closed_form(modules: tuple[str, ...], checkpointing: bool):
    """Three blocks of TinyLlama, with grouped heads: to the last FLOP, at a batch that was not traced."""
    shape = replace(architecture("tinyllama-1.1b"), num_layers=3)
    step = lora_step(shape, modules=modules, rank=8, checkpointing=checkpointing)
    expected = closed_forms.step_flops(
        shape, modules, rank=8, checkpointing=checkpointing, batch=2, tokens=300, logits=600
    )
    assert step.flops(2, 300) == expected


def test_llama2_7b_lora_flops_equal_a_traced_step_of_hugging_face_and_peft():
    """LoRA r32 on q and v, one sequence of 512: 6.920e12 forward and 7.092e12 backward there, to the last FLOP."""
    assert lora_step("llama2-7b").flops(1, 512) == 6_920_266_055_680 + 7_091_796_312_064


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("name", ["llama2-7b", "qwen2.5-0.5b", "qwen3-8b"])
def test_traced_weights_equal_the_closed_form(name: str, weights: str):
    """Two blocks, with biases, tied embeddings, head norms; quantised with all constants."""
    shape = replace(architecture(name), num_layers=2)
    precision = "fp32" if weights == "fp32" else "bf16"
    held = lora_step(shape, weights=weights, precision=precision).part_bytes("weights")
    assert held == closed_forms.weights_bytes(shape, weights, precision)


def test_nf4_with_double_quantisation_takes_4_127_bits():
    """litgpt saw 0.30 GB between single and double quantisation: 6.476e9 x (0.5625 - 0.51587) = 0.302 GB."""
    shape = architecture("llama2-7b")
    linear = 32 * shape.linear_params
    bf16, nf4 = (closed_forms.weights_bytes(shape, kind, "bf16") for kind in ("bf16", "nf4"))
    bits = 16 - 8 * (bf16 - nf4) / linear
    assert bits == pytest.approx(4.127, abs=0.001)
    assert linear * (0.5625 - bits / 8) / 1e9 == pytest.approx(0.302, abs=0.001)


def test_a_tx2_nx_refuses_llama2_7b_in_four_bits_but_takes_its_submodels():
    """4 GB less system and runtime leave 2.5 GB: the whole model is refused, with checkpointing too; 4 and 8 blocks fit."""
    shape = architecture("llama2-7b")
    for blocks, refused in ((32, True), (8, False), (4, False)):
        part = replace(shape, num_layers=blocks)
        for checkpointing in (False, True):
            step = lora_step(part, weights="nf4", checkpointing=checkpointing)
            load = Load.equal(np.ones(1), 1, 512, 512)
            costs = cost_of(step.trace, ("jetson-tx2-nx",), load=load, precision="bf16")
            assert (costs.row(0)["peak_memory_bytes"] > device("jetson-tx2-nx").budget_bytes) is refused


def test_others_measurements_are_met_row_by_row():
    """Each within what its kind of number allows, except where it is told why it is not; and in the median, by kind."""
    bounds = {
        "memory, servers, 16-bit": 0.20, "memory, 4-bit": 0.25, "memory, edge": 0.05,
        "time, servers": 0.50, "time, edge": 0.05, "traffic": 0.01,
    }  # fmt: skip
    missed = [row for row in rows() if not row.remark and abs(row.error) > bounds[row.group]]
    assert not missed
    explained = [row for row in rows() if row.remark]
    assert all(-0.5 < row.error < 2 for row in explained)
    assert len(explained) < len(rows()) / 2
    held_out = medians()
    assert held_out.keys() == bounds.keys()
    assert held_out["memory, servers, 16-bit"][1] < 0.08
    assert held_out["memory, 4-bit"][1] < 0.25
    assert held_out["time, servers"][1] < 0.30
    assert held_out["time, edge"][1] < 0.30


def test_no_row_is_held_out_whose_source_fitted_what_its_prediction_uses():
    """By source: siblings of a fitted number prove no more than it does."""
    fitted = {(run.source, run.fits) for run in MEASUREMENTS if run.fits}
    for run in MEASUREMENTS:
        if run.kind == HELD_OUT:
            assert not {(run.source, constant) for constant in run.uses} & fitted, run.name
    kinds = {kind: sum(run.kind == kind for run in MEASUREMENTS) for kind in (HELD_OUT, SAME_SOURCE, FITTED)}
    assert min(kinds.values()) > 10
    assert {row.group for row in rows() if row.kind == HELD_OUT} == {row.group for row in rows()}


def test_the_catalogues_fractions_are_those_that_the_fit_prints():
    """To two digits, in the precision that was measured; and none above 1 is in the catalogue."""
    assert {"server-a100", "server-l40s", "jetson-nano", "jetson-tx2"} < fitted_devices().keys()
    for name, runs in fitted_devices().items():
        fraction, profile = fitted_fraction(runs), device(name)
        stands = profile.sustained_fp32 if runs[0].precision == "fp32" else profile.sustained_fp16
        assert stands == float(f"{fraction:.2g}") < 1
        assert "fitted to" in dict(profile.sources)["sustained"], name


def test_seconds_and_joules_of_one_round_by_hand():
    """1 MB at 8 Mbit/s is 1 s each way, with 2 messages of 0.1 s latency 1.2 s; 8 W idle, 52 W more busy."""
    trace = by_hand()
    costs = cost_of(trace, latency_seconds=0.1, num_messages=2)
    assert (costs.downlink_seconds[0], costs.uplink_seconds[0]) == pytest.approx((1.2, 1.2))
    assert costs.sim_seconds[0] == pytest.approx(2.4 + costs.compute_seconds[0])
    assert costs.energy_joules[0] == pytest.approx(8 * costs.sim_seconds[0] + 52 * costs.compute_seconds[0])
    assert cost_of(trace, uplink_bytes=0, latency_seconds=0.1).uplink_seconds[0] == 0
    idle = Load.equal(np.zeros(1, int), 2, 64, 40)
    assert cost_of(trace, load=idle).compute_seconds[0] == 0


def test_every_operator_takes_the_longer_of_its_flops_and_its_bytes():
    """128 tokens: three products of 1.28e11 FLOPs, compute bound; 2e6 bytes besides; 10 launches of 20 us. Ten steps."""
    orin = device("jetson-agx-orin-64gb")
    rate, bandwidth = orin.sustained_flops("fp32"), orin.sustained_bytes_per_second
    costs = cost_of(by_hand())
    assert costs.compute_seconds[0] == pytest.approx(10 * (3 * 1.28e11 / rate + 2e6 / bandwidth + 10 * 20e-6))
    assert costs.flops[0] == 10 * 3 * 1.28e11
    starved = StepTrace(
        side((3, polynomial(BS=1.0), polynomial(one=1e9)), moved=np.zeros(NUM)), by_hand().server, by_hand().moments,
        by_hand().saved, by_hand().cut, by_hand().upload,
    )  # fmt: skip
    assert cost_of(starved).compute_seconds[0] == pytest.approx(10 * 3 * 1e9 / bandwidth)


def test_the_server_of_a_split_model_works_while_the_client_waits():
    """One product of 1e12 BS FLOPs per step on an A100 in fp32."""
    trace = by_hand(side((1, polynomial(BS=1e12), polynomial(one=1.0)), moved=np.zeros(NUM), num_ops=1))
    costs = cost_of(trace)
    seconds = 10 * (128e12 / device("server-a100").sustained_flops("fp32") + 10e-6)
    assert costs.server_seconds[0] == pytest.approx(seconds)
    assert costs.server_flops[0] == 10 * 128e12
    assert costs.sim_seconds[0] == pytest.approx(2 + costs.compute_seconds[0] + seconds)


def test_memory_is_that_of_the_largest_step_and_time_that_of_all():
    """Client 1 takes steps of 10 and 30 tokens, client 0 one of 20: peaks at 20 and 30, FLOPs of 20 and 40 tokens."""
    basis = monomials([1, 1, 1], [20, 10, 30], [5, 5, 5])
    load = Load.of_steps(np.array([0, 1, 1]), basis, 2)
    costs = cost_of(by_hand(), ("jetson-nano", "jetson-nano"), load=load)
    assert costs.peak_memory_bytes.tolist() == [1e9 + 20 * 4e6, 1e9 + 30 * 4e6]
    assert costs.flops.tolist() == [20 * 3e9, 40 * 3e9]


def test_logits_on_response_tokens_only_save_head_flops_and_memory():
    """A quarter of the positions: three quarters of the head's FLOPs less, forward and backward."""
    step, shape = lora_step("llama3.2-3b"), architecture("llama3.2-3b")
    full, some = (
        cost_of(step.trace, load=Load.equal(np.ones(1), 4, 128, logits), precision="bf16") for logits in (512, 128)
    )
    assert full.flops[0] - some.flops[0] == 2 * 2 * 384 * shape.embedding_params
    assert full.peak_memory_bytes[0] - some.peak_memory_bytes[0] > 384 * 8 * shape.vocab_size
    assert 0 < CHUNKED_LOGITS < 1


def test_clients_are_priced_as_arrays():
    """A thousand times as many take nowhere near a thousand times as long: measured 7 times, 3 ms."""
    fleet = build_fleet(FleetConfig(num_clients=10_000), 0)
    trace = lora_step("llama2-7b", weights="nf4").trace
    tokens = np.random.default_rng(0).uniform(64, 512, 10_000)

    def once(num_clients: int) -> float:
        ids = np.arange(num_clients)
        start = time.process_time()
        down_bps, up_bps, latency = fleet.draw_rates(0, 1, ids)
        costs = estimate(
            trace, Load.equal(np.full(num_clients, 10), 4, tokens[ids], tokens[ids]),
            Traffic(33e6, 33e6, down_bps, up_bps, latency, radio=fleet.radio(ids)), precision="bf16",
            devices=fleet.devices, device_index=fleet.device_index[ids],
        )  # fmt: skip
        assert len(costs) == num_clients
        return time.process_time() - start

    few, many = (min(once(num_clients) for _ in range(10)) for num_clients in (10, 10_000))
    assert many < 100 * few


def test_clients_are_independent_of_who_stands_beside_them():
    load = Load.equal(np.full(2, 10), 2, np.array([64, 128]), 40)
    together = cost_of(by_hand(), ("jetson-nano", "server-a100"), load=load)
    alone = cost_of(by_hand(), ("server-a100",), load=load.at(np.array([1])))
    assert {name: column[1] for name, column in together.columns().items()} == alone.row(0)


def test_an_unknown_architecture_or_family_is_refused():
    class Config:
        model_type = "gpt2"

    with pytest.raises(UserError, match="did you mean 'llama2-7b'"):
        architecture("llama-2-7b")
    with pytest.raises(UserError, match="no such family"):
        ModelShape.from_hf_config(Config())


def test_an_architecture_can_be_named_by_its_hub_id():
    assert architecture("Qwen/Qwen2.5-0.5B") is architecture("qwen2.5-0.5b")


def test_the_page_of_costs_ends_with_the_table_that_is_printed():
    page = REPOSITORY / "docs" / "reference" / "cost.md"
    assert page.read_text().endswith(table() + "\n")
