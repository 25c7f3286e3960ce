"""The cost model: closed forms against worked numbers, traced steps, and what torch counts in a real step."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from fleetune.cost.estimate import estimate
from fleetune.cost.flops import backward_flops, client_flops, forward_flops, server_flops
from fleetune.cost.memory import NF4_BYTES, memory_need, weights_bytes
from fleetune.cost.roofline import step_traffic
from fleetune.cost.shapes import ARCHITECTURES, LINEARS, ModelShape, architecture
from fleetune.cost.validation import CHUNKED_LOGITS, GEMMA3_270M, lora_work, medians, peak_bytes, rows, table
from fleetune.errors import UserError
from fleetune.fleet.devices import device
from fleetune.fleet.fleet import FleetConfig, build_fleet

TINY = ModelShape("tiny", 3, 64, 96, 4, 2, 16, 128)


def flops_of(step, *, batch: int, tokens: int) -> float:
    return batch * tokens * (step.per_token + step.per_token_pair * tokens + step.per_logit)


def cost_of(work, devices=("jetson-agx-orin-64gb",), **fields):
    """One client per device: 10 steps of 128 tokens, 1 MB each way at 8 Mbit/s, no latency."""
    clients = {
        "num_steps": 10, "mean_tokens": 128, "max_tokens": 128, "downlink_bytes": 1e6, "uplink_bytes": 1e6,
        "down_bps": 8e6, "up_bps": 8e6, "latency_seconds": 0.0, **fields,
    }  # fmt: skip
    profiles = [device(name) for name in devices]
    return estimate(work, devices=profiles, device_index=np.arange(len(profiles)), **clients)


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


def test_llama2_7b_lora_flops_equal_the_traced_step():
    """LoRA r32 on q and v, one sequence of 512: 6.920e12 forward, 7.092e12 backward, to the last FLOP."""
    work = lora_work("llama2-7b")
    assert flops_of(forward_flops(work, range(32), head=True), batch=1, tokens=512) == 6_920_266_055_680
    assert flops_of(backward_flops(work, range(32), head=True), batch=1, tokens=512) == 7_091_796_312_064


def test_every_traced_row_is_met_within_a_thousandth_or_the_rounding_of_its_reference():
    """References are printed with one decimal for other models than LLaMA2-7B; 5.2 GB may be 5.15."""
    traced = [row for row in rows() if row.kind == "traced"]
    assert len(traced) > 50
    for row in traced:
        assert abs(row.predicted - row.reference) <= max(0.001 * row.reference, 0.05 * ("llama2-7b" not in row.what)), (
            row
        )


def test_published_memory_is_met_within_two_percent_eager_and_eleven_compiled():
    known = ("huggingface/peft", "RTX 4090", "five phones")
    memory = [
        r for r in rows() if r.kind == "published" and r.unit in ("GB", "GiB") and any(k in r.source for k in known)
    ]
    assert len(memory) == 6
    for row in memory:
        assert abs(row.error) < (0.11 if "compiled" in row.source else 0.02), row


def test_calibrated_step_times_are_met_within_a_fifth():
    times = [row for row in rows() if row.kind == "calibrated" and row.unit == "s/step"]
    assert len(times) == 6
    assert all(abs(row.error) < 0.2 for row in times)
    assert table().count("\n") == len(rows()) + 3


def test_nf4_with_double_quantisation_takes_4_127_bits():
    """litgpt saw 0.30 GB between single and double quantisation: 6.476e9 x (0.5625 - 0.51587) = 0.302 GB."""
    assert pytest.approx(4.127, abs=0.001) == 8 * NF4_BYTES
    assert 32 * architecture("llama2-7b").linear_params * (0.5625 - NF4_BYTES) / 1e9 == pytest.approx(0.302, abs=0.001)


def test_bytes_moved_and_kernels_of_a_traced_step():
    """LLaMA2-7B LoRA q, v at b=4 x 512: 227.07 GB over 4370 kernels; forward only: 88.28 GB over 1626."""
    for passes, moved, kernels in (("train", 227.07e9, 4370), ("forward", 88.28e9, 1626)):
        traffic = step_traffic(lora_work("llama2-7b", batch_size=4, passes=passes))
        predicted = traffic.fixed_bytes + 4 * 512 * (traffic.per_token + traffic.per_logit)
        assert predicted == pytest.approx(moved, rel=0.05)
        assert traffic.num_ops == pytest.approx(kernels, rel=0.01)


def test_a_tx2_nx_refuses_llama2_7b_in_four_bits_but_takes_its_submodels():
    """4 GB less system and runtime leave 2.7 GB: 7.0 GB is refused, 1.53 (4 blocks) and 2.31 GB (8) fit."""
    for blocks, refused in ((32, True), (8, False), (4, False)):
        work = lora_work("llama2-7b", num_layers=blocks, weight_dtype="nf4")
        costs = cost_of(work, ["jetson-tx2-nx"], mean_tokens=300, max_tokens=512)
        assert costs.over_budget.item() is refused
        assert costs.row(0)["over_budget"] is refused
    assert costs.peak_memory_bytes[0] / 1e9 == pytest.approx(1.534, abs=0.001)


def test_training_only_the_last_blocks_saves_backward_flops_and_activations():
    """Of 32 blocks the last 8: activations of 8, forward through 32, backward through 8 and the head."""
    full = lora_work("llama2-7b")
    last = dataclasses.replace(full, trainable_layers=tuple(range(24, 32)))
    assert memory_need(last).kept_per_token == memory_need(full).kept_per_token / 4
    forward = forward_flops(full, range(32), head=True)
    assert forward_flops(last, range(32), head=True) == forward
    ratio = flops_of(backward_flops(last, range(32), head=True), batch=1, tokens=512)
    ratio /= flops_of(backward_flops(full, range(32), head=True), batch=1, tokens=512)
    assert 0.25 < ratio < 0.30  # a quarter of the blocks, and the whole head


def test_zeroth_order_work_keeps_nothing_and_pays_for_its_forwards():
    """Two forwards per step: twice the FLOPs of one, no gradients or moments, the traced peak of 13.71 GB."""
    once = lora_work("llama2-7b", passes="forward", optimizer="sgd")
    twice = dataclasses.replace(once, forwards_per_step=2.0)
    assert client_flops(twice) == client_flops(once).scaled(2)
    assert memory_need(twice).gradient_bytes == memory_need(twice).optimizer_bytes == 0
    assert peak_bytes(twice, 512) == pytest.approx(13_711_979_024, rel=1e-5)


def test_a_split_client_and_its_server_do_the_work_of_the_whole():
    """The cut changes where FLOPs are done, not how many: 8 blocks here, 24 blocks and the head there."""
    whole, split = lora_work("llama2-7b"), lora_work("llama2-7b", split=8)
    assert client_flops(split) + server_flops(split) == client_flops(whole)
    assert client_flops(split).per_logit == 0
    assert weights_bytes(split) == 3_500_277_760  # the trace: 1,750,142,976 parameters with the norm, less 4096, x 2
    costs = cost_of(split, ["jetson-agx-orin-64gb"])
    assert costs.server_flops[0] == pytest.approx(10 * flops_of(server_flops(split), batch=1, tokens=128))
    parts = costs.downlink_seconds + costs.compute_seconds + costs.server_seconds + costs.uplink_seconds
    assert costs.sim_seconds[0] == pytest.approx(parts[0])
    assert costs.server_seconds[0] == pytest.approx(costs.server_flops[0] / (312e12 * 0.69))


def test_a_frozen_split_client_runs_forward_only():
    """Adapters on the server alone: the lowest block stops at its first adapter, no client goes back."""
    work = dataclasses.replace(lora_work("llama2-7b", split=8), trainable_layers=tuple(range(8, 32)))
    assert client_flops(work) == forward_flops(work, range(8), head=False)
    assert server_flops(work).per_token < server_flops(lora_work("llama2-7b", split=8)).per_token
    assert memory_need(work).kept_per_token == 0


def test_seconds_and_joules_of_one_round_by_hand():
    """1 MB at 8 Mbit/s is 1 s each way, with 2 messages of 0.1 s latency 1.2 s; 8 W idle, 52 W more busy."""
    work = lora_work(TINY, batch_size=2)
    costs = cost_of(work, latency_seconds=0.1, num_messages=2)
    assert (costs.downlink_seconds[0], costs.uplink_seconds[0]) == pytest.approx((1.2, 1.2))
    assert costs.sim_seconds[0] == pytest.approx(2.4 + costs.compute_seconds[0])
    assert costs.energy_joules[0] == pytest.approx(8 * costs.sim_seconds[0] + 52 * costs.compute_seconds[0])
    assert cost_of(work, uplink_bytes=0, latency_seconds=0.1).uplink_seconds[0] == 0
    assert cost_of(work, num_steps=0).compute_seconds[0] == 0


def test_compute_bound_time_is_flops_over_sustained_rate_and_launches():
    """LLaMA2-7B, 4 x 512 on AGX Orin: 5.605e13 FLOPs at 0.39 x 42.6e12 is 3.37 s; 4370 launches of 20 us."""
    costs = cost_of(lora_work("llama2-7b", batch_size=4), num_steps=1, mean_tokens=512, max_tokens=512)
    assert costs.compute_seconds[0] == pytest.approx(5.6048e13 / (0.39 * 42.6e12) + 4370 * 20e-6, rel=0.002)
    single = cost_of(lora_work("llama2-7b", batch_size=4, precision="fp32"), num_steps=1, mean_tokens=512)
    assert single.compute_seconds[0] > 5.6048e13 / (0.49 * 5.32e12)  # fp32 work runs at the fp32 rate


def test_logits_on_response_tokens_only_save_head_flops_and_memory():
    """A quarter of the positions: a quarter of the head's FLOPs, 10.5V bytes per token less at the peak."""
    work = lora_work("llama3.2-3b", batch_size=4)
    full, some = (cost_of(work, num_steps=1, logit_fraction=fraction) for fraction in (1.0, 0.25))
    head = 4 * 128 * 0.75 * client_flops(work).per_logit
    assert full.flops[0] - some.flops[0] == pytest.approx(head)
    saved = full.peak_memory_bytes[0] - some.peak_memory_bytes[0]
    assert saved == pytest.approx(4 * 128 * 0.75 * 14 * 128256)
    assert CHUNKED_LOGITS == 0.25


def test_a_thousand_clients_take_two_milliseconds():
    fleet = build_fleet(FleetConfig(num_clients=10_000), 0)
    work = lora_work("llama2-7b", batch_size=4, weight_dtype="nf4")
    tokens = np.random.default_rng(0).uniform(64, 512, 10_000)

    def once(num_clients: int) -> float:
        ids = np.arange(num_clients)
        start = time.perf_counter()
        down_bps, up_bps, latency = fleet.draw_rates(0, 1, ids)
        costs = estimate(
            work, devices=fleet.devices, device_index=fleet.device_index[ids], num_steps=10,
            mean_tokens=tokens[ids] / 2, max_tokens=tokens[ids], downlink_bytes=33e6, uplink_bytes=33e6,
            down_bps=down_bps, up_bps=up_bps, latency_seconds=latency, radio=fleet.radio(ids),
        )  # fmt: skip
        assert len(costs) == num_clients
        return time.perf_counter() - start

    once(10)  # the kind of client is worked out once
    assert min(once(1_000) for _ in range(10)) < 2e-3
    assert min(once(10_000) for _ in range(10)) < 15e-3


def test_clients_are_independent_of_who_stands_beside_them():
    together = cost_of(lora_work(TINY), ["jetson-nano", "server-a100"], mean_tokens=np.array([64, 128]))
    alone = cost_of(lora_work(TINY), ["server-a100"])
    assert {name: column[1] for name, column in together.columns().items()} == alone.row(0)


def test_edgeflowertune_uploads_follow_from_the_shape():
    """Gemma-3-270M, q, k, v, o: 18 x 5120 x 8 x 4 bytes, the 2.949 MB that EdgeFlowerTune measured."""
    work = lora_work(GEMMA3_270M, rank=8, modules=LINEARS[:4])
    assert memory_need(work).adapter_bytes == 2_949_120


# ---- against torch


def hf_model(precision: str, modules: tuple[str, ...], first: int, family: str):
    """A tiny random model of Hugging Face with PEFT's LoRA r4 on the blocks from ``first`` on."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16, vocab_size=128, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    shape = ModelShape.from_hf_config(config)
    assert shape.num_params() == model.num_parameters()
    lora = LoraConfig(
        r=4, target_modules=list(modules), layers_to_transform=list(range(first, 3)), task_type="CAUSAL_LM"
    )
    return shape, get_peft_model(model, lora)


@pytest.mark.parametrize(
    ("precision", "modules", "first", "family"),
    [
        ("fp32", ("q_proj", "v_proj"), 0, "llama"),
        ("bf16", ("q_proj", "v_proj"), 0, "llama"),
        ("fp32", LINEARS, 1, "qwen2"),
        ("bf16", LINEARS, 0, "llama"),
        ("fp32", ("o_proj", "down_proj"), 0, "llama"),
        ("fp32", ("gate_proj", "up_proj"), 2, "llama"),
        ("bf16", ("down_proj",), 1, "llama"),
        ("bf16", ("q_proj",), 1, "qwen3"),
        ("fp32", ("o_proj", "up_proj"), 1, "qwen3"),
    ],
)
def test_a_real_step_does_the_flops_and_keeps_the_bytes_of_the_closed_form(precision, modules, first, family):
    torch = pytest.importorskip("torch")
    from torch.utils import flop_counter

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counters = {  # torch's counter does not know the CPU's flash attention
        flash: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    shape, model = hf_model(precision, modules, first, family)
    held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[object, int]] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept.setdefault(storage.data_ptr(), (tensor, storage.nbytes()))
        return tensor

    ids = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))
    with flop_counter.FlopCounterMode(display=False, custom_mapping=counters) as counted:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        kept_bytes = sum(num_bytes for _, num_bytes in kept.values())
        kept.clear()
        loss.backward()

    work = lora_work(shape, modules=modules, rank=4, batch_size=2, weight_dtype=precision, precision=precision)
    work = dataclasses.replace(
        work,
        trainable_layers=tuple(range(first, 3)),
        lora_targets=tuple(target for target in work.lora_targets if target.layer >= first),
    )
    assert counted.get_total_flops() == flops_of(client_flops(work), batch=2, tokens=32)
    log_softmax = 4 * 128
    shared = kept_bytes / 64 - memory_need(work).kept_per_token - log_softmax
    assert 0 <= shared <= 16 * work.compute_bytes + 16  # cosines and sines, once for all blocks, and the ids


def test_an_unknown_architecture_or_family_is_refused():
    class Config:
        model_type = "gpt2"

    with pytest.raises(UserError, match="did you mean 'llama2-7b'"):
        architecture("llama-2-7b")
    with pytest.raises(UserError, match="no such family"):
        ModelShape.from_hf_config(Config())


def test_the_page_of_costs_ends_with_the_table_that_is_printed():
    page = Path(__file__).parents[1] / "docs" / "cost.md"
    assert page.read_text().endswith(table() + "\n")


def test_others_measurements_are_met():
    """Half of what was measured elsewhere, and fitted nothing, is met within 15 % (memory) and 30 % (time); where a point is
    further off than that, its row says why."""
    found = medians()
    assert {kind: points >= least for (kind, (points, _)), least in zip(found.items(), (20, 10, 4), strict=True)} == {
        "memory": True,
        "time": True,
        "traffic": True,
    }
    assert found["memory"][1] < 0.15
    assert found["time"][1] < 0.30
    assert found["traffic"][1] < 0.01
    far = [
        row for row in rows() if row.kind == "published" and abs(row.error) > (0.3 if row.unit == "s/step" else 0.15)
    ]
    assert all(";" in row.source for row in far)
