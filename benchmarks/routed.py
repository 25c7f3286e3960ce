"""Time of a mixture at one matrix against the adapters in the pool: MoLE, and SmartFed's router, masked and gathered.

    python benchmarks/routed.py
    python benchmarks/routed.py --width 1024 --tokens 512 --rank 32 --quota 32 --adapters 2 4 8 16 32

SmartFed's figure 3b has the latency of whole-adapter gates over the number of adapters. The quota stays the same here while the
pool grows. Forms are timed in turn: forward alone without gradients, and with the gradients of the input and of the gate.
Milliseconds of processor time of one thread, the least of the repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import measure
from fleetune.models import pools
from fleetune.models.pools import MoLE, Pool, Router
from fleetune.models.routed import routed

SITE = "layers.0.self_attn.q_proj"


def pool(num_adapters: int, rank: int, width: int, quota: int) -> Pool:
    """Random adapters at one square matrix."""
    held: dict[str, Tensor] = {f"{SITE}.kept_scale": torch.ones(quota)}
    for n in range(num_adapters):
        held[f"pool.{n}.{SITE}.lora_A"] = torch.randn(rank, width) / width**0.5
        held[f"pool.{n}.{SITE}.lora_B"] = torch.randn(width, rank) / rank**0.5
    found = Pool.of(held, SITE, dtype=torch.float32, device=torch.device("cpu"))
    assert found is not None
    return found


def milliseconds(work: Callable[[], Any]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def forward(found: MoLE | Router, x: Tensor) -> Tensor:
    """The mixture's output, without gradients."""
    with torch.no_grad():
        return found(x)


def step(found: MoLE | Router, x: Tensor, gate: Tensor) -> None:
    """The output, and the gradients of the input and of the gate."""
    torch.autograd.grad(found(x).sum(), [x, gate])


def masked(x: Tensor, weights: Tensor, index: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`routed`, in its masked form."""
    return routed(x, weights, index, a, b, is_gathered=False)


def gathered(x: Tensor, weights: Tensor, index: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`routed`, in its gathered form."""
    return routed(x, weights, index, a, b, is_gathered=True)


def row(num_adapters: int, args: argparse.Namespace) -> dict[str, Any]:
    """Times of MoLE's gate and of a router over one pool, and how far the router's two forms are apart."""
    made, width = pool(num_adapters, args.rank, args.width, args.quota), args.width
    x = torch.randn(1, args.tokens, width, requires_grad=True)
    router = (torch.randn(1, num_adapters * args.rank, width) / width**0.5).requires_grad_()
    gate = torch.zeros(1, num_adapters, num_adapters, width, requires_grad=True)
    mole = MoLE(made, gate, torch.zeros(1, 1))
    chosen = Router(made, lambda x: x @ router.mT, 1, notes=False)
    forms = {"MoLE": (mole, gate, routed), "masked": (chosen, router, masked), "gathered": (chosen, router, gathered)}
    times: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for _ in range(args.repeats):
        for name, (found, leaf, form) in forms.items():
            pools.routed = form  # type: ignore[assignment]
            for what, work in (("", lambda: forward(found, x)), (" step", lambda: step(found, x, leaf))):  # noqa: B023
                times[name + what] = min(times.get(name + what, float("inf")), milliseconds(work))
            outputs[name] = forward(found, x)
    pools.routed = routed
    error = (outputs["masked"] - outputs["gathered"]).abs().max() / outputs["masked"].abs().max()
    return {
        "adapters": num_adapters,
        **dict(sorted(times.items(), key=lambda item: "step" in item[0])),
        "apart": float(error),
    }


def main() -> None:
    """Print a table, a row for each size of the pool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quota", type=int, default=16)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure.report("routed", [row(count, args) for count in args.adapters])


if __name__ == "__main__":
    main()
