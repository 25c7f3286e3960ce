"""Where a round of the LoRA workload goes: processor time of every process on Ray, and of a worker's step by kind of work.

python benchmarks/round_profile.py
python benchmarks/round_profile.py --workers 1 --kernels torch
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from torch.profiler import ProfilerActivity, profile

import measure
import workload
from fleetune.problem import set_threads
from stacking import NUM_STEPS, Trial, make_case

# By the names under which PyTorch's profiler knows them; the first kind whose start fits takes an operator.
KINDS = {
    "attention": ("_Attention", "_Rotary", "aten::_scaled_dot_product", "aten::_flash"),
    "norms, gates, loss": (
        "_RMSNorm",
        "_SwiGLU",
        "_CrossEntropy",
        "aten::silu",
        "aten::_log_softmax",
        "aten::nll_loss",
    ),
    "products of the frozen base": ("aten::mm", "aten::addmm"),
    "products of the adapters": ("aten::bmm", "aten::baddbmm"),
    "copies, sums and other operators": ("aten::",),
}
BETWEEN = "Python and autograd between them"


def seconds_by_process(root: int) -> dict[str, float]:
    """Processor seconds so far of this process and what it started, by what they are."""
    out: dict[str, float] = {}
    for pid in measure.descendants(root):
        try:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                command = file.read()
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        names = {"RayWorker": "workers", "RayCoordinator": "coordinator"}
        kind = next((kind for name, kind in names.items() if name in command), "Ray's own processes")
        kind = "the process that started the run" if pid == root else kind
        out[kind] = out.get(kind, 0.0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return out


def of_processes(num_workers: int, num_rounds: int, kernels: str) -> list[dict[str, Any]]:
    """Processor time per client-round by process, and what the clock says."""
    marks: list[tuple[float, dict[str, float]]] = []

    def after(round_idx: int) -> None:
        if round_idx in (1, num_rounds + 1):  # the first rounds warm up
            marks.append((time.perf_counter(), seconds_by_process(os.getpid())))

    execution = {"workers": num_workers, "threads": 1, "kernels": kernels}
    spec = workload.spec({"rounds.num_rounds": num_rounds + 3, "execution": {"kind": "ray", **execution}})
    workload.timed_rounds(spec, workload.inputs(spec, workload.Llama().build()), after=after)
    (started, before), (ended, used) = marks
    client_rounds = num_rounds * spec.rounds.clients_per_round
    rows = [
        {"where": kind, "ms": 1e3 * (seconds - before.get(kind, 0.0)) / client_rounds} for kind, seconds in used.items()
    ]
    rows.append({"where": f"the clock, {num_workers} workers", "ms": 1e3 * (ended - started) / client_rounds})
    return rows


def of_a_step(num_clients: int, kernels: str, *, repeats: int = 5) -> list[dict[str, Any]]:
    """A client-step of a stacked cohort by kind of work; the profiler's own time is in it."""
    set_threads(1)
    trial = Trial(make_case("wide"), num_clients, device="cpu", precision="fp32", kernels=kernels)
    trial.train(num_clients, num_clients)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        started = time.process_time()
        for _ in range(repeats):
            trial.train(num_clients, num_clients)
        taken = 1e3 * (time.process_time() - started)
    spent = dict.fromkeys((*KINDS, BETWEEN), 0.0)
    for event in watched.key_averages():
        kind = next((kind for kind, starts in KINDS.items() if event.key.startswith(starts)), BETWEEN)
        spent[kind] += event.self_cpu_time_total / 1e3
    spent[BETWEEN] = taken - sum(spent.values()) + spent[BETWEEN]
    steps = repeats * num_clients * NUM_STEPS
    return [
        {"where": f"a step: {kind}", "ms": total / steps, "share": total / sum(spent.values())}
        for kind, total in spent.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8, help="of the cohort whose step is looked into")
    parser.add_argument("--kernels", choices=("compiled", "torch"), default="compiled")
    args = parser.parse_args()
    measure.like_a_worker()
    rows = of_processes(args.workers, args.rounds, args.kernels)
    rows += of_a_step(args.clients, args.kernels)
    measure.report("round_profile", rows)


if __name__ == "__main__":
    main()
