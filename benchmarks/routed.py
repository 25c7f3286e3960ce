"""Time of a mixture at one matrix against the adapters in the pool: MoLE, and SmartFed's router, masked and gathered.

    python benchmarks/routed.py
    python benchmarks/routed.py --width 1024 --tokens 512 --rank 32 --quota 32 --adapters 2 4 8 16 32

SmartFed's figure 3b has the latency of whole-adapter gates over the number of adapters. The quota stays the same here while the
pool grows. Forms are timed in turn, forward alone and without gradients; processor time of one thread, the least of the repeats.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

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


def milliseconds(found: MoLE | Router, x: Tensor) -> float:
    """Processor time of one call."""
    start = time.process_time()
    with torch.no_grad():
        found(x)
    return 1e3 * (time.process_time() - start)


def forms(num_adapters: int, args: argparse.Namespace) -> dict[str, MoLE | Router]:
    """MoLE's gate and a router over one pool."""
    made, width = pool(num_adapters, args.rank, args.width, args.quota), args.width
    router = torch.randn(1, num_adapters * args.rank, width) / width**0.5
    return {
        "mole": MoLE(made, torch.zeros(1, num_adapters, num_adapters, width), torch.zeros(1, 1)),
        "masked": Router(made, lambda x: x @ router.mT, 1, notes=False),
        "gathered": Router(made, lambda x: x @ router.mT, 1, notes=False),
    }


def gathered(x: Tensor, weights: Tensor, index: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`routed`, in its gathered form."""
    return routed(x, weights, index, a, b, is_gathered=True)


def main() -> None:
    """Print a table, a row for each size of the pool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quota", type=int, default=16)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, args.tokens, args.width)
    print("| adapters | MoLE, ms | router, masked, ms | router, gathered, ms | difference of the two |")
    print("| --- | --- | --- | --- | --- |")
    for count in args.adapters:
        made, times, outputs = forms(count, args), {}, {}
        for _ in range(args.repeats):
            for name, found in made.items():
                pools.routed = gathered if name == "gathered" else routed  # type: ignore[assignment]
                times[name] = min(times.get(name, float("inf")), milliseconds(found, x))
                with torch.no_grad():
                    outputs[name] = found(x)
        pools.routed = routed
        error = (outputs["masked"] - outputs["gathered"]).abs().max() / outputs["masked"].abs().max()
        print(f"| {count} | {' | '.join(f'{times[name]:.2f}' for name in made)} | {error:.1e} |")


if __name__ == "__main__":
    main()
