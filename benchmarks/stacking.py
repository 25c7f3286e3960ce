"""Clients stacked in one cohort beside the same clients one by one, for 1 to 32 clients, in one process.

    python benchmarks/stacking.py                    # three models, one thread and two
    python benchmarks/stacking.py --model deep --threads 1 --clients 1 16
    python benchmarks/stacking.py --threads 1 --device cuda --precision bf16 --matmul 8192
    python benchmarks/stacking.py --kinds            # every kind of adapter beside plain pairs, stacked

One-by-one runs the same code with cohorts of one client. Both are timed in turn, so that a busy machine hits both;
--kinds times kinds of adapters in turn, too: pairs of rank 8 at every linear layer; the same with a third factor; and after both
halves of every block bottlenecks of width 16, or what a generator of C2A's sizes makes.
--cpu-time takes the processor's time instead of the clock's, so that waiting for a core does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import measure
import workload
from fleetune.methods.base import Context
from fleetune.methods.c2a import C2A, C2AConfig
from fleetune.models.base import BaseModel, placed
from fleetune.models.config import LoRAConfig, ModelConfig
from fleetune.models.generated import HISTOGRAM
from fleetune.models.load import load_base
from fleetune.models.lora import init_lora
from fleetune.models.model import Model
from fleetune.models.network import Network, linear_sites
from fleetune.models.submodel import Submodel
from fleetune.problem import set_threads
from fleetune.tensors import Tensors
from fleetune.training.config import LocalConfig
from fleetune.training.device import set_up
from fleetune.training.plan import ClientTask, LocalPlan
from fleetune.training.trainer import train_cohort

NUM_STEPS, NUM_TOKENS = 2, 64


@dataclass(frozen=True)
class Case:
    """A base model, which of its layers are adapted, and the examples per step."""

    base: BaseModel
    targets: Any
    batch_size: int


def make_case(name: str) -> Case:
    """``wide`` is the LoRA workload; ``deep`` has small products and many of them; ``micro`` is the model of the quickstart."""
    qv = ["q_proj", "v_proj"]
    if name == "wide":
        return Case(workload.Llama().build(), qv, 4)
    if name == "deep":
        return Case(workload.Llama(num_layers=16, hidden_size=64, intermediate_size=172).build(), qv, 1)
    return Case(load_base(ModelConfig()), "all-linear", 8)


Adapters = Callable[[BaseModel, LoRAConfig], Tensors]


def pairs(base: BaseModel, lora: LoRAConfig) -> Tensors:
    """A and B at every site."""
    return init_lora(linear_sites(base, lora), lora, run_seed=0)


def third_factors(base: BaseModel, lora: LoRAConfig) -> Tensors:
    """A, B and E at every site."""
    return {
        **pairs(base, lora),
        **{f"{site}.lora_E": torch.ones(lora.rank) for site in linear_sites(base, lora)},
    }


def bottlenecks(base: BaseModel, lora: LoRAConfig, *, width: int = 16) -> Tensors:
    """A bottleneck after both halves of every block."""
    hidden = base.shape.hidden_size
    shapes = {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}
    return {
        f"layers.{n}.{half}.bottleneck_{name}": 0.01 * torch.randn(shape)
        for n in range(base.num_layers)
        for half in ("self_attn", "mlp")
        for name, shape in shapes.items()
    }


def generators(base: BaseModel, lora: LoRAConfig) -> Tensors:
    """A generator of the method's default sizes, for four categories."""
    method = C2A(C2AConfig(), Context(base, lora, linear_sites(base, lora), 1, 0, 4))
    return {**method.start().tensors, HISTOGRAM: torch.full((4,), 0.25)}


KINDS: dict[str, Adapters] = {
    "pairs": pairs,
    "third factor": third_factors,
    "bottleneck": bottlenecks,
    "generated": generators,
}


class Trial:
    """One case with everything that the trainer needs, for up to ``num_clients`` clients.

    Clients train pairs, unless ``adapters`` gives others: (base, settings) -> the tensors from which each starts.
    """

    def __init__(
        self,
        case: Case,
        num_clients: int,
        *,
        device: str,
        precision: str,
        kernels: str,
        adapters: Adapters | None = None,
    ):
        lora = LoRAConfig(rank=8, alpha=16.0, targets=case.targets)
        submodel = Submodel.prefix(case.base.num_layers)
        set_up(device, kernels)
        base = placed(case.base, device=device, precision=precision)
        self.network = Network(base, submodel, lora, precision=precision)
        self.plan = LocalPlan(Model(submodel), trainable=lambda name: name != HISTOGRAM)
        self.local = LocalConfig(steps=NUM_STEPS, batch_size=case.batch_size)
        self.start: Tensors = (adapters or pairs)(case.base, lora)
        per_client = NUM_STEPS * case.batch_size
        self.data = workload.random_tokens(num_clients * per_client, NUM_TOKENS, int(case.base.config["vocab_size"]))
        rows = np.arange(num_clients * per_client).reshape(num_clients, NUM_STEPS, case.batch_size)
        self.tasks = [ClientTask(k, 1.0 / num_clients, rows[k], 1e-3, (0, k)) for k in range(num_clients)]

    def train(self, num_clients: int, cohort: int) -> None:
        """Train the first clients in cohorts of ``cohort``."""
        for first in range(0, num_clients, cohort):
            tasks = self.tasks[first : min(first + cohort, num_clients)]
            train_cohort(self.network, self.plan, self.start, tasks, data=self.data, local=self.local)

    def flops_per_step(self) -> int:
        """FLOPs of one client's step, counted by PyTorch while it is carried out."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.train(1, 1)
        return counter.get_total_flops() // NUM_STEPS


def compare(trial: Trial, num_clients: int, *, repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds per client-step, stacked and one by one: medians of interleaved repetitions."""
    seconds: dict[int, list[float]] = {num_clients: [], 1: []}
    for repeat in range(repeats + 1):
        for cohort, taken in seconds.items():
            started = clock()
            trial.train(num_clients, cohort)
            if repeat:  # the first one warms up
                taken.append((clock() - started) / (num_clients * NUM_STEPS))
    return measure.median_and_min(seconds[num_clients])[0], measure.median_and_min(seconds[1])[0]


def compare_kinds(
    trials: Mapping[str, Trial], num_clients: int, *, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds per client-step of each trial's stacked clients: medians of interleaved repetitions."""
    seconds: dict[str, list[float]] = {kind: [] for kind in trials}
    for repeat in range(repeats + 1):
        for kind, trial in trials.items():
            started = clock()
            trial.train(num_clients, num_clients)
            if repeat:  # the first one warms up
                seconds[kind].append((clock() - started) / (num_clients * NUM_STEPS))
    return {kind: measure.median_and_min(taken)[0] for kind, taken in seconds.items()}


def report_kinds(args: argparse.Namespace, clock: Callable[[], float]) -> None:
    """The table of --kinds: milliseconds of a client's step, and times those of plain pairs at every linear layer."""
    rows = []
    settings = {"device": args.device, "precision": args.precision, "kernels": args.kernels}
    for threads in [1] if args.cpu_time else args.threads:
        set_threads(threads)
        for name in args.model:
            case = replace(make_case(name), targets="all-linear")
            trials = {kind: Trial(case, max(args.clients), adapters=made, **settings) for kind, made in KINDS.items()}
            for num_clients in args.clients:
                seconds = compare_kinds(trials, num_clients, repeats=args.repeats, clock=clock)
                rows += [
                    {
                        "model": name,
                        "threads": torch.get_num_threads(),
                        "clients": num_clients,
                        "adapter": kind,
                        "ms": 1e3 * taken,
                        "times_pairs": taken / seconds["pairs"],
                    }
                    for kind, taken in seconds.items()
                ]
    measure.report("stacking_kinds", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("wide", "deep", "micro"), nargs="*", default=["wide", "deep", "micro"])
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall-clock time; one thread only"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--kernels", choices=("compiled", "torch"), default="compiled")
    parser.add_argument(
        "--matmul", type=int, default=1024, help="size of the product to compare with; on a GPU take 8192"
    )
    parser.add_argument("--kinds", action="store_true", help="kinds of adapters beside plain pairs instead")
    args = parser.parse_args()
    measure.like_a_worker()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.kinds:
        report_kinds(args, clock)
        return
    rows = []
    for threads in [1] if args.cpu_time else args.threads:
        set_threads(threads)
        for name in args.model:
            trial = Trial(
                make_case(name), max(args.clients), device=args.device, precision=args.precision, kernels=args.kernels
            )
            flops = trial.flops_per_step()
            for num_clients in args.clients:
                # Beside each case, as the machine's rate changes with its load.
                peak = measure.matmul_flops_per_second(
                    args.matmul, clock=clock, device=args.device, precision=args.precision
                )
                stacked, single = compare(trial, num_clients, repeats=args.repeats, clock=clock)
                rows.append(
                    {
                        "model": name,
                        "threads": torch.get_num_threads(),
                        "clients": num_clients,
                        "stacked_ms": 1e3 * stacked,
                        "one_by_one_ms": 1e3 * single,
                        "speedup": single / stacked,
                        "gflops": flops / stacked / 1e9,
                        "matmul_gflops": peak / 1e9,
                        "share": flops / stacked / peak,
                    }
                )
    measure.report("stacking", rows)


if __name__ == "__main__":
    main()
