"""Compiled kernels beside PyTorch's: each piece by itself, and a whole step of a cohort, timed in turn.

python benchmarks/kernels.py
python benchmarks/kernels.py --model wide --clients 8 --repeats 12
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import measure
from fleetune.models.fused import attention, cross_entropy, rms_norm, rotary, swiglu
from fleetune.problem import set_threads
from fleetune.training.device import set_up
from stacking import NUM_STEPS, Trial, make_case

CHOICES = ("torch", "compiled")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("wide", "deep", "micro"), nargs="*", default=["wide", "deep", "micro"])
    parser.add_argument("--clients", type=int, default=8, help="of the cohort")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    measure.like_a_worker()
    set_threads(1)
    rows = [{"what": name, **in_turn(work, args.repeats, calls=50)} for name, work in pieces().items()]
    for name in args.model:
        trial = Trial(make_case(name), args.clients, device="cpu", precision="fp32", kernels="torch")
        row = in_turn(lambda trial=trial: trial.train(args.clients, args.clients), args.repeats)  # type: ignore[misc]
        per_step = args.clients * NUM_STEPS
        times = {key: value / per_step for key, value in row.items() if key != "ratio"}
        rows.append({"what": f"client-step of {name}, {args.clients} stacked", **times, "ratio": row["ratio"]})
    measure.report("kernels", rows)


if __name__ == "__main__":
    main()
