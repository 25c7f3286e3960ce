"""Traced costs beside what the same code really does on this machine: FLOPs, bytes kept, peak memory, bytes sent.

Each case is a real local update of two steps on a random model of three blocks, and the trace of it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fleetune import scopes
from fleetune.cost.polynomials import FORMS, POINTS, Fitter, Point, evaluate, monomials
from fleetune.cost.recording import live_bytes, possible_peaks
from fleetune.cost.trace import PARTS, SideWork, StepTrace
from fleetune.engine.round.serving import serve
from fleetune.methods import METHODS
from fleetune.methods.base import Context, Method, Payload, Report
from fleetune.methods.reuse import Reuse
from fleetune.models.architectures import ModelShape, architecture
from fleetune.models.base import PRODUCT_DTYPES, BaseModel, placed
from fleetune.models.config import LINEAR_NAMES, LoRAConfig
from fleetune.models.network import linear_sites
from fleetune.models.outline import hf_values, meta_weights
from fleetune.models.quantize import quantize_linears
from fleetune.pricing import tracing
from fleetune.pricing.mapping import CostedModel
from fleetune.pricing.tracing import Tracing, WorkShape, _examples
from fleetune.pricing.validation import lora_step
from fleetune.training.config import LocalConfig
from fleetune.training.plan import ClientTask
from fleetune.training.trainer import StackedAdapters
from fleetune.training.worker import Worker
from support import closed_forms, tiny

WIDE = ModelShape("wide", 3, 64, 192, 4, 4, 16, 256)
GROUPED = ModelShape("grouped", 3, 64, 128, 4, 2, 32, 320, tied_embeddings=True)
BIASED = ModelShape("biased", 4, 128, 192, 2, 1, 64, 256, qkv_bias=True)
NORMED = ModelShape("normed", 3, 64, 128, 4, 2, 16, 256, qk_norm=True)
SHAPES = {shape.name: shape for shape in (WIDE, GROUPED, BIASED, NORMED)}
BATCHES = (Point(1, 96, 40, 112), Point(2, 64, 100, 80), Point(4, 48, 9, 50))

SETTINGS: dict[str, dict[str, Any]] = {
    "devft": {"initial_capacity": 1},
    "fedprox": {"mu": 0.1},
    "fedsoda": {"quantization": "none"},  # torch's counter has no formulas for bitsandbytes' products
    **{name: {"split_point": 1} for name in ("lesft", "sfl", "sl", "split-frozen", "split-lora")},
}
CASES = {**{name: (name, {}) for name in METHODS}, "devft+fedsa-lora": ("devft", {"aggregation": "fedsa-lora"})}
CASES["linear-arithmetic"] = ("linear-arithmetic", {"tune": True})
CASES["lorahub of two"] = ("lorahub", {"candidates": 2})
CASES |= {f"split-lora {server}": ("split-lora", {"server": server}) for server in ("in_turn", "per_client")}
COMPUTE_NOTHING = {"linear-arithmetic untuned": ("linear-arithmetic", {"tune": False})}
"""Cases in which a client runs no operator: there is nothing real to hold their traces against."""


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
    if (
        weights == "nf4"
    ):  # of the products' type, as checkpoints are: of another, bitsandbytes unpacks to that one first
        tensors = quantize_linears({n: t.to(PRODUCT_DTYPES[precision]) for n, t in tensors.items()}, "nf4")
    config = {**hf_values(shape), "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    base = BaseModel(shape.name, config, tensors, "nf4" if weights == "nf4" else "none", "")
    return placed(base, device="cpu", precision=precision)


def world(
    case: str = "fedit", shape: ModelShape = WIDE, *, weights: str = "fp32", precision: str = "fp32",
    checkpointing: bool = False, lora: LoRAConfig | None = None, round_idx: int = 3, **local: Any,
) -> World:  # fmt: skip
    """``round_idx``: of eight; 3 is in the second of devft's three stages."""
    name, settings = {**CASES, **COMPUTE_NOTHING}[case]
    base, lora = random_base(shape, weights, precision), lora or LoRAConfig(rank=4)
    if issubclass(METHODS[name], Reuse):
        library = tiny.library_folder((4, 3), shape.num_layers, width=shape.hidden_size, inner=shape.intermediate_size)
        settings = {"adapters": [library], **settings}
    config = METHODS[name].Config(name=name, **{**SETTINGS.get(name, {}), **settings})
    method = METHODS[name](config, Context(base, lora, linear_sites(base, lora), 8, 0, num_examples=100))
    steps = LocalConfig(checkpointing=checkpointing, **local)
    # A server that works by itself does so from the first round on. As in a plan, its work gives no tensors here.
    round_idx = 0 if method.traits.serves else round_idx
    state = method.begin_round(method.start(), round_idx, Report(0.0))
    state, _ = serve(method, state, round_idx, carry_out=lambda work: {}, price=lambda work: (0.0, 0.0))
    payload = method.broadcast(state, round_idx, None)
    tracing = Tracing(CostedModel(base), method, lora, steps, None)
    worker = Worker(base=base, lora=lora, local=steps, data=_examples(POINTS[0]), precision=precision)
    return World(method, worker, payload, tracing, WorkShape(weights, precision, checkpointing))


@functools.cache
def usual(case: str, checkpointing: bool) -> World:
    """The world of a case for all tests that look at it, so that its trace is made once."""
    return world(case, checkpointing=checkpointing)


def at(polynomial: np.ndarray, point: Point) -> float:
    return float(evaluate(polynomial, monomials(*([x] for x in point)))[0])


def bytes_moved(work: SideWork) -> np.ndarray:
    """Bytes of all operators of a step, (NUM,)."""
    return work.moved + (work.products[:, 1] * work.counts[:, None]).sum(0)


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


OPERATOR = "one operator"


class Marked(TorchDispatchMode):
    """Shows a profiler where each operator begins and ends, those of the backward pass too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with record_function(OPERATOR):
            return func(*args, **(kwargs or {}))


def peak_of_allocator(this: World, point: Point) -> int:
    """The most bytes that the CPU's allocator has given out at the end of an operator and not taken back.

    That is what the method holds. What a library takes for itself is given back by then: how much it is (converted inputs,
    packed matrices) depends on the instructions for which the library has a kernel.
    """
    this.update(point)  # networks are assembled once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, Marked():
        this.update(point)
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = np.cumsum([num_bytes for _, num_bytes in changes])
    ends = [e.start_ns() + e.duration_ns() for e in events if e.name() == OPERATOR]
    return int(held[np.searchsorted([at for at, _ in changes], ends, side="right") - 1].max())


def test_two_points_tell_every_form_apart():
    """The ratios of the forms' values at the two points all differ, so a size has one form; the constant is then exact."""
    fitter = Fitter()
    ratios = [first / second for _, first, second in fitter.forms]
    assert len(set(ratios)) == len(FORMS)
    size = [7 * point.batch_size * (point.num_tokens - 1) for point in POINTS]
    assert fitter(*size).tolist() == [0, -7, 0, 7, 0, 0, 0, 0, 0]
    assert fitter(12, 12).tolist() == [12, 0, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="follow none of"):
        fitter(11, 13)


def test_saved_activations_equal_the_closed_form():
    """LLaMA2-7B whole, 32 blocks, adapters of rank 8 on all linears."""
    shape = architecture("llama2-7b")
    trace = lora_step(shape, modules=LINEAR_NAMES, rank=8, weights="fp32", precision="fp32").trace
    for point in (*BATCHES, Point(2, 4096, 5000)):
        batch, tokens, logits, _ = point
        expected = closed_forms.saved_bytes(shape, rank=8, batch=batch, tokens=tokens, logits=logits)
        assert at(trace.saved, point) == expected


def test_bytes_over_the_cut_are_those_of_the_tensors_that_cross_it():
    """Up activations and int32 labels, down gradients, in fp32, of the steps that were really taken."""
    this = world("split-lora")
    trace = this.trace()
    for point in BATCHES:
        sent, received = this.update(point, steps=3).cut_bytes[:, 0].tolist()
        assert 3 * at(trace.cut[0], point) == sent == 3 * point.batch_size * point.num_tokens * (4 * 64 + 4)
        assert 3 * at(trace.cut[1], point) == received


@pytest.mark.parametrize("architecture_name", ["llama2-7b", "qwen3-8b"])
def test_another_architecture_is_laid_out_by_fraction_of_its_depth(architecture_name: str):
    """Of 3 blocks, 1 is the client's; so are 11 or 12 of 32 or 36. Tensors have the costed sizes and the trained rank."""
    shape = architecture(architecture_name)
    this = world("split-lora")
    model = CostedModel(this.method.context.base, shape)
    client = model.method(this.method).local_plan(model.payload(this.payload, 3)).split
    assert client == {32: 11, 36: 12}[shape.num_layers]
    sent = model.payload(this.payload, 3).tensors
    assert {int(name.split(".")[1]) for name in sent} == set(range(client))
    assert sent["layers.7.mlp.up_proj.lora_A"].shape == (4, shape.hidden_size)
    assert sent["layers.7.self_attn.k_proj.lora_B"].shape == (shape.num_kv_heads * shape.head_dim, 4)


def test_a_trace_is_kept_on_disk_by_what_it_depends_on(tmp_path: Path):
    """The same work again is read; another learning rate is the same work, another rank or checkpointing is not."""

    def traces(**settings: Any) -> tuple[StepTrace, int]:
        this = world(**settings)
        tracing = Tracing(CostedModel(this.method.context.base), this.method, this.method.context.lora, this.worker.local,
                          tmp_path)  # fmt: skip
        return tracing.trace(this.payload, this.shape), len(list((tmp_path / "traces").glob("*.json")))

    first, number = traces()
    assert number == 1
    again, number = traces(learning_rate=0.5)
    assert number == 1
    assert again.to_json() == first.to_json()
    assert traces(checkpointing=True)[1] == 2
    assert traces(lora=LoRAConfig(rank=2))[1] == 3


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("case", ["c2a", "fedprox", "fedsa-lora", "devft+fedsa-lora"])
def test_a_deep_model_is_traced_on_two_shallow_ones(case: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch):
    """Eight blocks from three and four: the same, to the last byte, as when all eight are run. A model with a block of its own
    is run as it is."""
    this = world(case, replace(WIDE, num_layers=8), checkpointing=checkpointing, round_idx=7)
    depths: list[int] = []
    recorded = tracing.Tracing._recorded
    with monkeypatch.context() as patch:
        patch.setattr(
            tracing.Tracing,
            "_recorded",
            lambda self, model, *rest: (depths.append(model.shape.num_layers), recorded(self, model, *rest))[1],
        )
        fast = this.trace()
    assert depths == [3, 4]
    whole = this.tracing._recorded(this.tracing.model, this.payload, this.shape).trace()
    for side in ("client", "server"):
        ours, theirs = getattr(fast, side), getattr(whole, side)
        assert ours.flops.tolist() == theirs.flops.tolist()
        assert bytes_moved(ours).tolist() == bytes_moved(theirs).tolist()
        assert ours.num_ops == theirs.num_ops
    assert fast.saved.tolist() == whole.saved.tolist()
    basis = np.concatenate([monomials(*([x] for x in point)) for point in (*BATCHES, Point(1, 4000, 1))])
    assert fast.peak(basis).tolist() == whole.peak(basis).tolist()
    odd = "layers.5.mlp.up_proj.lora_A"
    uneven = {n: t for n, t in this.payload.tensors.items() if n != odd}
    plan = this.method.local_plan(this.payload)
    assert this.tracing._is_uniform(this.payload, plan)
    # The generator of c2a belongs to no block, so no block can lack a tensor.
    assert this.tracing._is_uniform(Payload(uneven), plan) == (odd not in this.payload.tensors)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_flops_equal_those_that_torch_counts_in_real_steps(case: str, checkpointing: bool):
    """Two steps, client and server together, at batches that were not traced."""
    this = usual(case, checkpointing)
    trace = this.trace()
    for point in BATCHES:
        assert 2 * (at(trace.client.flops, point) + at(trace.server.flops, point)) == counted_flops(this, point)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_peak_memory_is_the_allocators(case: str, checkpointing: bool):
    """To 0.5 %, client and server together, at batches that were not traced."""
    met(usual(case, checkpointing))


VARIANTS: dict[str, tuple[ModelShape, dict[str, Any]]] = {
    "nf4": (WIDE, {"weights": "nf4"}),
    "nf4, checkpointing": (WIDE, {"weights": "nf4", "checkpointing": True}),
    "nf4 in bf16, biases": (BIASED, {"weights": "nf4", "precision": "bf16"}),
    "bf16, grouped heads": (GROUPED, {"weights": "bf16", "precision": "bf16"}),
    "bf16, head norms": (NORMED, {"weights": "bf16", "precision": "bf16"}),
    "bf16, checkpointing, biases": (BIASED, {"weights": "bf16", "precision": "bf16", "checkpointing": True}),
    "sgd, q and v alone": (GROUPED, {"optimizer": "sgd", "lora": LoRAConfig(rank=8, targets=("q_proj", "v_proj"))}),
    "one linear, no clipping": (NORMED, {"max_grad_norm": None, "lora": LoRAConfig(rank=2, targets=("down_proj",))}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_storage_precision_optimizer_and_adapters_show(variant: str):
    """Peak memory to 0.5 %; what autograd keeps, to the byte; FLOPs to the last one, where torch can count them."""
    shape, settings = VARIANTS[variant]
    this = world("fedit", shape, **settings)
    trace = this.trace()
    met(this)
    for point in BATCHES:
        assert at(trace.saved, point) == kept_bytes(this, point), point
        if settings.get("weights") != "nf4":  # bitsandbytes' product is one operator that torch's counter does not know
            assert 2 * at(trace.client.flops, point) == counted_flops(this, point)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_saved_activations_are_those_of_a_real_step(case: str, checkpointing: bool):
    this = usual(case, checkpointing)
    trace = this.trace()
    for point in BATCHES:
        assert at(trace.saved, point) == kept_bytes(this, point), point


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_no_bit(dropout: float):
    """Losses and uploads of two steps are the same with it; with dropout the blocks that run again draw what they drew."""
    results = [
        world(checkpointing=checkpointing, lora=LoRAConfig(rank=4, dropout=dropout)).update(BATCHES[1])
        for checkpointing in (False, True)
    ]
    assert results[0].losses.tolist() == results[1].losses.tolist()
    assert torch.equal(results[0].upload.data, results[1].upload.data)


def test_quantised_weights_take_as_many_flops_as_whole_ones():
    whole, int8, nf4 = (world(weights=weights).trace().client.flops.tolist() for weights in ("fp32", "int8", "nf4"))
    assert whole == int8 == nf4


def test_a_checkpointed_block_repeats_its_last_product_where_that_is_one_function_with_its_adapter():
    """A quantised layer is not: autograd stops where all that it wants is there, before B of the last adapter (4 x 64)."""
    whole, int8, nf4 = (
        world(weights=weights, checkpointing=True).trace().client.flops for weights in ("fp32", "int8", "nf4")
    )
    assert int8.tolist() == nf4.tolist()
    for batch, tokens, logits, _ in BATCHES:
        point = Point(batch, tokens, logits)
        repeated = 3 * 2 * batch * tokens * 4 * 64  # three blocks
        assert at(whole, point) == at(int8, point) + repeated


def met(this: World) -> None:
    """The traced peak is the allocator's, to 0.5 %, once what only the simulation holds (a second gradient) stands beside it."""
    trace = this.trace()
    (first, *_), (second, *_) = this.tracing.record(this.tracing.model, this.payload, this.shape)
    both_sides = possible_peaks(live_bytes(first, second, (scopes.CLIENT, scopes.SERVER)))
    simulated = (*PARTS, scopes.SIMULATION)
    with_simulation = possible_peaks(live_bytes(first, second, (scopes.CLIENT, scopes.SERVER), simulated))
    for point in BATCHES:
        basis = monomials(*([x] for x in point))
        dynamic = dynamic_peak(both_sides, basis)
        assert dynamic_peak(with_simulation, basis) == pytest.approx(peak_of_allocator(this, point), rel=0.005), point
        client = trace.peak(basis)[0]
        without_weights = client.sum() - client[PARTS.index("weights")]
        assert without_weights < dynamic if trace.server.num_ops else without_weights == dynamic


def dynamic_peak(moments: np.ndarray, basis: np.ndarray) -> float:
    """Most bytes at any of the moments (m, parts, 6), weights left out."""
    live = evaluate(moments, basis)[0]
    return float((live.sum(axis=1) - live[:, PARTS.index("weights")]).max())


@pytest.mark.parametrize("num_layers", [3, 8], ids=["all blocks", "two shallow ones"])
def test_a_client_that_computes_nothing_holds_its_base_and_its_adapter(num_layers: int):
    """Composed before it is sent: no FLOPs, no seconds, and the bytes of the weights and of the adapter, whatever the batch."""
    this = world("linear-arithmetic untuned", replace(WIDE, num_layers=num_layers))
    trace = this.trace()
    assert (trace.client.num_ops, trace.client.flops.any(), trace.saved.any()) == (0, False, False)
    network = this.worker.network(this.method.model(this.payload))
    held = [*network.model.parameters(), *network.model.buffers(), *this.payload.held.values()]
    parts = trace.peak(monomials([0, 4], [0, 48], [0, 9]))
    assert parts.sum(axis=1).tolist() == [sum(t.untyped_storage().nbytes() for t in held)] * 2
    assert StepTrace.from_json(trace.to_json()).peak(monomials([1], [1], [1])).tolist() == parts[:1].tolist()


@pytest.mark.parametrize("case", ["fedit", "fedsa-lora"])
def test_a_device_holds_one_gradient(case: str):
    """4 bytes for each trained element where AdamW's two moments take 8: the simulation's buffer beside it is nobody's."""
    this = world(case, lora=LoRAConfig(rank=64))
    parts = dict(zip(PARTS, this.trace().peak(monomials([1], [1], [1]))[0], strict=True))
    assert parts["optimizer"] == 2 * parts["gradients"] > 0
    if case == "fedit":
        assert parts["gradients"] == 4 * sum(t.numel() for t in this.payload.tensors.values())


def kept_bytes(this: World, point: Point) -> int:
    """Bytes that autograd keeps on the client of the first real step, weights and adapters left out."""
    network = this.worker.network(this.method.model(this.payload))
    # Where something is held, a site's matrix is the sum of it and the base's: still a weight.
    merged = [site.weight for site in network.sites.values()]
    tensors = [*network.model.parameters(), *network.model.buffers(), *this.worker.base.weights.values(), *merged]
    known = {t.untyped_storage().data_ptr() for t in tensors}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if scopes.current.side == scopes.CLIENT and place not in known and not is_adapter(tensor):
            kept.setdefault(place, tensor)
        return tensor

    def is_adapter(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in stacks

    stacks: set[int] = set()
    made = StackedAdapters.__init__

    def recorded(self: StackedAdapters, *args: Any) -> None:
        made(self, *args)
        stacks.update(stack.data.untyped_storage().data_ptr() for stack in (self.trained, self.frozen))

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        patch.setattr(StackedAdapters, "__init__", recorded)
        this.update(point, steps=1)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_the_first_trace_of_a_process_is_like_the_second():
    """What PyTorch imports when it is first needed must not keep tensors of the trace alive."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import test_trace\n"
        "for _ in range(2):\n"
        "    print(test_trace.world('fedit', test_trace.WIDE).trace().moments.tolist())\n"
    )
    here = Path(__file__).parent
    call = [sys.executable, "-c", script, str(here), str(here.parent)]
    first, second = subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()
    assert first == second
