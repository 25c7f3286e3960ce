"""What a cost trace takes: seconds of a core and memory, of every method on LLaMA2-7B, and on the model that is trained.

python benchmarks/trace.py
python benchmarks/trace.py --model llama2-13b --method fedit
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import measure

METHODS = ("fedit", "fedprox", "fedsa-lora", "devft", "split-lora")


def child(method: str, model: str | None, checkpointing: bool) -> None:
    """One trace from an empty cache, in NF4 and bf16; the second one shows what importing took."""
    import torch

    from fleetune.methods.base import Report
    from fleetune.models.architectures import architecture
    from fleetune.plan.walk import outline
    from fleetune.pricing.mapping import CostedModel
    from fleetune.pricing.tracing import Tracing, WorkShape
    from fleetune.spec import from_dict

    torch.set_num_threads(1)
    problem, _ = outline(from_dict({"method": {"name": method}}))
    costed = CostedModel(problem.inputs.base, architecture(model) if model else None)
    tracing = Tracing(costed, problem.method, problem.spec.model.lora, problem.spec.local, None)
    with torch.device("meta"):
        state = problem.method.begin_round(problem.method.start(), problem.spec.rounds.num_rounds - 1, Report(0.0))
    payload = problem.method.broadcast(state, problem.spec.rounds.num_rounds - 1, None)
    out: dict[str, float] = {}
    for name in ("first_cpu_seconds", "cpu_seconds"):
        started = time.process_time()
        tracing._traced(payload, WorkShape("nf4", "bf16", checkpointing))
        out[name] = time.process_time() - started
    print(json.dumps({**out, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> None:
    """Each trace in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="architecture to cost")
    parser.add_argument("--method", choices=METHODS, help="this method alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(**json.loads(args.child))
        return
    rows = []
    for method in [args.method] if args.method else METHODS:
        for model, checkpointing in ((args.model, False), (args.model, True), (None, False)):
            work = {"method": method, "model": model, "checkpointing": checkpointing}
            command = [sys.executable, __file__, "--child", json.dumps(work)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({**work, "model": model or "micro-llama", **found})
    measure.report("trace", rows)


if __name__ == "__main__":
    main()
