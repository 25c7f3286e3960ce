"""Compiled kernels beside PyTorch's operators and beside torch.compile: each piece by itself, and whole steps, timed in turn.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --part steps --model wide --clients 8 --repeats 12
    python benchmarks/kernels.py --part torch-compile            # needs g++ and Python's headers

The part torch-compile times one step (loss and backward pass) of micro-llama for 4 clients with 4 examples of 64 tokens.
torch.compile takes one block, whose compiled form all 16 share; head and loss stay PyTorch's. --region step gives it the full
step instead, which takes it many minutes. Its cache begins empty, so that its first step holds all of its compilation.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import measure
from fleetune.models import block
from fleetune.models.config import ModelConfig
from fleetune.models.fused import attention, cross_entropy, rms_norm, rotary, swiglu
from fleetune.models.load import load_base
from fleetune.problem import set_threads
from fleetune.training.device import set_up
from fleetune.training.loss import cohort_loss
from fleetune.training.trainer import StackedAdapters, collate_step
from stacking import NUM_STEPS, Case, Trial, make_case

CHOICES = ("torch", "compiled")
PARTS = ("pieces", "steps", "torch-compile")


def step(output: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """A piece forward and backward."""
    gradient = torch.randn_like(output())
    return lambda: torch.autograd.grad(output(), leaves, gradient)


def pieces(num_tokens: int = 2048) -> dict[str, Callable[[], object]]:
    """The sizes of the LoRA workload: 8 clients, 4 examples of 64 tokens, 4 heads of 32."""
    h, gain = torch.randn(num_tokens, 128, requires_grad=True), torch.randn(128)
    gate, up = (torch.randn(num_tokens, 344, requires_grad=True) for _ in range(2))
    heads = torch.randn(num_tokens // 64, 64, 4, 32).transpose(1, 2).requires_grad_()
    angle = torch.randn(1, 1, 64, 16).repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    q, k, v = (torch.randn(num_tokens // 64, 64, 4, 32, requires_grad=True) for _ in range(3))
    logits, targets = torch.randn(num_tokens, 512, requires_grad=True), torch.randint(512, (num_tokens,))
    return {
        "norm": step(lambda: rms_norm(h, gain, 1e-6)[1], h),
        "rotation": step(lambda: rotary(heads, cos, sin), heads),
        "attention and its rotations": step(lambda: attention(q, k, v, cos, sin, 32**-0.5), q, k, v),
        "gate": step(lambda: swiglu(gate, up), gate, up),
        "loss": step(lambda: cross_entropy(logits, targets), logits),
    }


def in_turn(work: Callable[[], object], repeats: int, *, calls: int = 1) -> dict[str, Any]:
    """Milliseconds of processor time with either, and their ratio: medians over repetitions, the first one left out."""
    taken: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    for _ in range(repeats + 1):
        for choice, seconds in taken.items():
            set_up("cpu", choice)
            started = time.process_time()
            for _ in range(calls):
                work()
            seconds.append((time.process_time() - started) / calls)
    torchs, compiled = (statistics.median(seconds[1:]) for seconds in taken.values())
    return {"torch_ms": 1e3 * torchs, "compiled_ms": 1e3 * compiled, "ratio": torchs / compiled}


class Step:
    """The loss and the adapters' gradients of one step of ``num_clients`` clients of micro-llama, without the optimizer."""

    def __init__(self, num_clients: int, *, batch_size: int = 4):
        self.num_clients = num_clients
        case = Case(load_base(ModelConfig()), "all-linear", batch_size)
        trial = Trial(case, num_clients, device="cpu", precision="fp32", kernels="torch")
        self.network = trial.network
        self.adapters = StackedAdapters([trial.start] * num_clients, trial.plan, self.network.device)
        # Token ids and labels, (clients * batch size, 64) both.
        self.ids, self.labels = collate_step(trial.data, trial.tasks, 0, self.network.device)

    def losses(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of each client, (num_clients,)."""
        return cohort_loss(self.network, self.network.blocks(self.network.embed(ids)), labels, self.num_clients)[0]

    def run(self, losses: Callable[[Tensor, Tensor], Tensor] | None = None, *, num_tokens: int = 64) -> Tensor:
        """The gradients, (num_clients, P), by ``losses`` or its compiled form, on the first tokens of each example."""
        leaves = self.adapters.parameters(self.num_clients)
        self.network.set_adapter(self.adapters.all_tensors(leaves, self.num_clients))
        (losses or self.losses)(self.ids[:, :num_tokens], self.labels[:, :num_tokens]).sum().backward()
        return self.adapters.gather_gradients(leaves, self.num_clients).clone()


def run_block(layer: Any, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`fleetune.models.block.run_block` without its note of which block runs, by which torch.compile would compile each anew."""
    h, x = block.norm(layer.input_layernorm, h)
    heads = block._attention(layer.self_attn, x, cos, sin, attention)
    (h,) = block.linears(heads, [layer.self_attn.o_proj], residual=h)
    h, x = block.norm(layer.post_attention_layernorm, h)
    gate, up = block.linears(x, [layer.mlp.gate_proj, layer.mlp.up_proj])
    (h,) = block.linears(swiglu(gate, up), [layer.mlp.down_proj], residual=h)
    return h


def compiled_way(step: Step, region: str) -> Callable[..., Tensor]:
    """The step through torch.compile; nothing is compiled before its first call."""
    if region == "step":
        losses = torch.compile(step.losses)
        return lambda **kwargs: step.run(losses, **kwargs)
    compiled_block = torch.compile(run_block)

    def run(**kwargs: Any) -> Tensor:
        with mock.patch("fleetune.models.network.run_block", compiled_block):
            return step.run(**kwargs)

    return run


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """What torch.compile keeps on disk goes to a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        torch.compiler.reset()
        yield


def seconds_of(work: Callable[[], object]) -> dict[str, float]:
    """Seconds by the clock, and of processor time with that of the compilers that were started."""

    def processor() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    started, spent = time.perf_counter(), processor()
    work()
    return {"clock_s": time.perf_counter() - started, "processor_s": processor() - spent}


def beside_torch_compile(num_clients: int, repeats: int, region: str) -> list[dict[str, Any]]:
    """A step three ways in turn, in milliseconds of processor time per client, and what each costs before it is that fast."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # in this process, so that the compilers' time is counted
    step = Step(num_clients)
    set_up("cpu", "torch")
    expected = step.run()
    way = compiled_way(step, region)
    try:
        first = seconds_of(way)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        return [{"what": f"torch.compile cannot run here: {type(error).__name__}: {reason}"}]
    print(f"torch.compile's first step: {first}", flush=True)
    error = float((way() - expected).abs().max() / expected.abs().max())
    ways: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "PyTorch's operators": ("torch", step.run),
        "compiled kernels": ("compiled", step.run),
        f"torch.compile of the {region}": ("torch", way),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, (kernels, run) in ways.items():
            set_up("cpu", kernels)
            started = time.process_time()
            run()
            spent[name].append((time.process_time() - started) / num_clients)
    ms = {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in spent.items()}
    of_torch = ms["PyTorch's operators"]
    rows: list[dict[str, Any]] = [
        {"what": f"{name}, per client-step", "ms": value, "ratio": of_torch / value} for name, value in ms.items()
    ]
    set_up("cpu", "torch")
    rows.append({"what": "torch.compile: first step, nothing cached", **first, "error": error})
    print(measure.table(rows), flush=True)  # what follows takes minutes
    torch.compiler.reset()
    rows.append({"what": "torch.compile: first step, all on disk", **seconds_of(way)})
    print(measure.table(rows[-1:]), flush=True)
    rows.append({"what": "torch.compile: first step of another length", **seconds_of(lambda: way(num_tokens=57))})
    return rows


def step_row(name: str, num_clients: int, repeats: int) -> dict[str, Any]:
    """Whole client-steps of one of the models of stacking.py, with the optimizer, with either."""
    trial = Trial(make_case(name), num_clients, device="cpu", precision="fp32", kernels="torch")
    row = in_turn(lambda: trial.train(num_clients, num_clients), repeats)
    per_step = num_clients * NUM_STEPS
    times = {key: value / per_step for key, value in row.items() if key != "ratio"}
    return {"what": f"client-step of {name}, {num_clients} stacked", **times, "ratio": row["ratio"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--model", choices=("wide", "deep", "micro"), nargs="*", default=["wide", "deep", "micro"])
    parser.add_argument("--clients", type=int, default=8, help="of the cohort, in the part steps")
    parser.add_argument("--region", choices=("block", "step"), default="block", help="what torch.compile is given")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    measure.like_a_worker()
    set_threads(1)
    rows = []
    if "pieces" in args.part:
        rows += [{"what": name, **in_turn(work, args.repeats, calls=50)} for name, work in pieces().items()]
    if "steps" in args.part:
        rows += [step_row(name, args.clients, args.repeats) for name in args.model]
    if "torch-compile" in args.part:
        with empty_cache():
            rows += beside_torch_compile(4, args.repeats, args.region)
    measure.report("kernels", rows)


if __name__ == "__main__":
    main()
