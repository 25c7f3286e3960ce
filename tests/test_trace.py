"""Traced costs beside what the same code really does on this machine: FLOPs, bytes kept, peak memory, bytes sent.

Each case is a real local update of two steps on a random model of three blocks, and the trace of it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fleetune.cost.forms import FORMS, POINTS, Fitter, Point, evaluate, monomials
from fleetune.cost.shapes import ModelShape
from fleetune.cost.trace import PARTS, StepTrace
from fleetune.engine.costed import CostedModel
from fleetune.engine.tracing import Tracing, WorkShape, _examples
from fleetune.methods import METHODS
from fleetune.methods.base import Context, Method, Payload
from fleetune.models.base import BaseModel, placed
from fleetune.models.config import LoRAConfig
from fleetune.models.network import linear_sites
from fleetune.models.outline import hf_values, meta_weights
from fleetune.models.quantize import quantize_linears
from fleetune.training.config import LocalConfig
from fleetune.training.plan import ClientTask
from fleetune.training.worker import Worker

WIDE = ModelShape("wide", 3, 64, 192, 4, 4, 16, 256)
GROUPED = ModelShape("grouped", 3, 64, 128, 4, 2, 32, 320, tied_embeddings=True)
BIASED = ModelShape("biased", 4, 128, 192, 2, 1, 64, 256, qkv_bias=True)
NORMED = ModelShape("normed", 3, 64, 128, 4, 2, 16, 256, qk_norm=True)
SHAPES = {shape.name: shape for shape in (WIDE, GROUPED, BIASED, NORMED)}
BATCHES = (Point(1, 96, 40), Point(2, 64, 100), Point(4, 48, 9), Point(4, 32, 124), Point(8, 80, 300))

SETTINGS: dict[str, dict[str, Any]] = {
    "devft": {"initial_capacity": 1},
    "split-lora": {"split_point": 1},
    "fedprox": {"mu": 0.1},
}
CASES = {**{name: (name, {}) for name in METHODS}, "devft+fedsa-lora": ("devft", {"aggregation": "fedsa-lora"})}
CASES |= {f"split-lora {server}": ("split-lora", {"server": server}) for server in ("in_turn", "per_client")}


class World(NamedTuple):
    """A method on a random model, and what a client of its first round is sent."""

    method: Method
    worker: Worker
    payload: Payload
    tracing: Tracing
    shape: WorkShape

    def trace(self) -> StepTrace:
        return self.tracing.trace(self.payload, self.shape)

    def update(self, point: Point, *, steps: int = 2) -> Any:
        """The real work on a batch of this size."""
        self.worker.data = _examples(point)
        rows = np.tile(np.arange(point.batch_size), (steps, 1))
        return self.method.local_update(self.worker, self.payload, [ClientTask(0, 1.0, rows, 1e-3, (0, 0))])


@functools.cache
def random_base(shape: ModelShape, weights: str, precision: str) -> BaseModel:
    """Random weights of an architecture, stored as asked."""
    generator = torch.Generator().manual_seed(0)
    tensors = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in meta_weights(shape).items()}
    if weights == "nf4":
        tensors = quantize_linears(tensors, "nf4")
    config = {**hf_values(shape), "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    base = BaseModel(shape.name, config, tensors, "nf4" if weights == "nf4" else "none", "")
    return placed(base, device="cpu", precision=precision)


def world(
    case: str = "fedit", shape: ModelShape = WIDE, *, weights: str = "fp32", precision: str = "fp32",
    checkpointing: bool = False, lora: LoRAConfig | None = None, **local: Any,
) -> World:  # fmt: skip
    name, settings = CASES[case]
    base, lora = random_base(shape, weights, precision), lora or LoRAConfig(rank=4)
    config = METHODS[name].Config(name=name, **{**SETTINGS.get(name, {}), **settings})
    method = METHODS[name](config, Context(base, lora, linear_sites(base, lora), 8, 0))
    steps = LocalConfig(checkpointing=checkpointing, **local)
    payload = method.broadcast(method.begin_round(method.start(), 3), 3, None)  # devft: the second of three stages
    tracing = Tracing(CostedModel(base), method, lora, steps, None)
    worker = Worker(base=base, lora=lora, local=steps, data=_examples(POINTS[0]), precision=precision)
    return World(method, worker, payload, tracing, WorkShape(weights, precision, checkpointing))


def at(polynomial: np.ndarray, point: Point) -> float:
    return float(evaluate(polynomial, monomials(*([x] for x in point)))[0])


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTERS: Any = {  # torch's counter does not know the CPU's flash attention
    FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    FLASH_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


def counted_flops(this: World, point: Point) -> int:
    with FlopCounterMode(display=False, custom_mapping=COUNTERS) as counter:
        this.update(point)
    return counter.get_total_flops()


def peak_of_allocator(this: World, point: Point) -> int:
    """The most bytes that the CPU's allocator has given out during the work and not taken back."""
    this.update(point)  # networks are assembled once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        this.update(point)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def traced_peak(trace: StepTrace, point: Point) -> float:
    """The same of the trace, both sides together and without the weights, which are there before."""
    parts = trace.peak(monomials(*([x] for x in point)))[0]
    return float(parts.sum() - parts[PARTS.index("weights")])


def test_two_points_tell_every_form_apart():
    """The ratios of the forms' values at the two points all differ, so a size has one form; the constant is then exact."""
    fitter = Fitter()
    ratios = [first / second for _, first, second in fitter.forms]
    assert len(set(ratios)) == len(FORMS)
    size = [7 * point.batch_size * (point.num_tokens - 1) for point in POINTS]
    assert fitter(*size).tolist() == [0, -7, 0, 7, 0, 0]
    assert fitter(12, 12).tolist() == [12, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="follow none of"):
        fitter(11, 13)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("case", ["fedprox", "fedsa-lora"])
def test_a_deep_model_is_traced_on_two_shallow_ones(case: str, checkpointing: bool):
    """Eight blocks from three and four: the same, to the last byte, as when all eight are run. A model with a block of its own
    is run as it is."""
    this = world(case, replace(WIDE, num_layers=8), checkpointing=checkpointing)
    fast = this.trace()
    whole = this.tracing._recorded(this.tracing.model, this.payload, this.shape).trace()
    for side in ("client", "server"):
        ours, theirs = getattr(fast, side), getattr(whole, side)
        assert ours.flops.tolist() == theirs.flops.tolist()
        assert ours.bytes_moved.tolist() == theirs.bytes_moved.tolist()
        assert ours.num_ops == theirs.num_ops
    assert fast.saved.tolist() == whole.saved.tolist()
    basis = np.concatenate([monomials(*([x] for x in point)) for point in (*BATCHES, Point(1, 4000, 1))])
    assert fast.peak(basis).tolist() == whole.peak(basis).tolist()
    uneven = {n: t for n, t in this.payload.tensors.items() if n != "layers.5.mlp.up_proj.lora_A"}
    plan = this.method.plan(this.payload)
    assert this.tracing._alike(this.payload, plan)
    assert not this.tracing._alike(Payload(uneven), plan)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_flops_equal_those_that_torch_counts_in_real_steps(case: str, checkpointing: bool):
    """Two steps, client and server together, at batches that were not traced."""
    this = world(case, checkpointing=checkpointing)
    trace = this.trace()
    for point in BATCHES:
        assert 2 * (at(trace.client.flops, point) + at(trace.server.flops, point)) == counted_flops(this, point)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("split")])
def test_peak_memory_is_the_allocators(case: str, checkpointing: bool):
    this = world(case, checkpointing=checkpointing)
    trace = this.trace()
    for point in BATCHES:
        real = peak_of_allocator(this, point)
        assert traced_peak(trace, point) == pytest.approx(real, rel=0.005), point
