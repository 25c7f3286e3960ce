"""What the trace predicts beside what others measured: ``python -m fleetune.cost`` prints the table.

Measured were Hugging Face's Llama with PEFT, torchtune, and engines of their own; the trace is of this project's code for the
same model, adapter and batch. A constant of the model that was fitted to a measurement is marked: it proves nothing there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fleetune.cost.forms import evaluate, monomials
from fleetune.cost.published import MEASUREMENTS, MLP, QV, QVO_MLP, UPLOADS, Measurement
from fleetune.cost.roofline import seconds_of
from fleetune.cost.shapes import ModelShape, architecture
from fleetune.cost.trace import PARTS, StepTrace
from fleetune.data.tokenize import default_cache_dir
from fleetune.engine.costed import CostedModel, base_of
from fleetune.engine.tracing import Tracing, WorkShape
from fleetune.fleet.devices import device
from fleetune.methods.base import Context, Payload
from fleetune.methods.fedavg import FedIT, FedITConfig
from fleetune.models.config import LINEAR_NAMES, LoRAConfig
from fleetune.models.network import linear_sites
from fleetune.training.config import LocalConfig

GB, GIB = 1e9, 2**30
# torchtune's cross-entropy in 8 chunks: the share of the logits' memory that is there at once (assumed: the 16-bit logits of
# all positions, 2 of 14 bytes each, and one chunk of the rest).
CHUNKED_LOGITS = (2 + 12 / 8) / 14
GEMMA3_270M = ModelShape("gemma-3-270m", 18, 640, 2048, 4, 1, 256, 262144, True, source="google/gemma-3-270m")


@dataclass(frozen=True)
class Row:
    """One comparison. ``kind``: ``published``, or ``calibrated`` where the model was fitted to the number."""

    kind: str
    what: str
    unit: str
    reference: float
    predicted: float
    source: str

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.reference - 1


@dataclass(frozen=True)
class Step:
    """A LoRA step of some model, traced."""

    trace: StepTrace
    precision: str

    def peak_bytes(self, batch_size: int, num_tokens: int, *, logit_fraction: float = 1.0) -> float:
        """Peak bytes of a step; ``logit_fraction`` of its positions have logits."""
        basis = monomials([batch_size], [num_tokens], [batch_size * num_tokens * logit_fraction])
        return float(self.trace.peak(basis).sum())

    def part_bytes(self, *parts: str) -> float:
        """Bytes that parts of the memory hold whatever the batch is."""
        at_peak = dict(zip(PARTS, self.trace.peak(monomials([1], [1], [1]))[0], strict=True))
        return float(sum(at_peak[part] for part in parts))

    def flops(self, batch_size: int, num_tokens: int) -> float:
        """FLOPs of a step with logits at every position."""
        basis = monomials([batch_size], [num_tokens], [batch_size * num_tokens])
        return float(evaluate(self.trace.client.flops, basis)[0])

    def seconds(self, batch_size: int, num_tokens: int, device_name: str) -> float:
        """Seconds of a step with logits at every position."""
        basis = monomials([batch_size], [num_tokens], [batch_size * num_tokens])
        where = np.zeros(1, int)
        return float(seconds_of(self.trace.client, basis, self.precision, [device(device_name)], where)[0])


def lora_step(
    model: str | ModelShape,
    *,
    modules: tuple[str, ...] = QV,
    rank: int = 32,
    weights: Any = "bf16",
    precision: Any = "bf16",
    checkpointing: bool = False,
    optimizer: Any = "adamw",
) -> Step:
    """A step of LoRA on ``modules`` of every block."""
    shape = architecture(model) if isinstance(model, str) else model
    base, lora = base_of(shape), LoRAConfig(rank=rank, targets=modules)
    local = LocalConfig(optimizer=optimizer)
    method = FedIT(FedITConfig(), Context(base, lora, linear_sites(base, lora), 1, 0))
    tracing = Tracing(CostedModel(base), method, lora, local, default_cache_dir())
    with torch.device("meta"):
        payload = Payload(
            {
                f"{site}.{factor}": torch.empty(size)
                for site, (num_in, num_out) in method.context.sites.items()
                for factor, size in (("lora_A", (rank, num_in)), ("lora_B", (num_out, rank)))
            }
        )
    return Step(tracing.trace(payload, WorkShape(weights, precision, checkpointing)), precision)


def _published_memory() -> list[Row]:
    def row(what: str, unit: str, reference: float, predicted: float, source: str, kind: str = "published") -> Row:
        return Row(kind, what, unit, reference, predicted / (GIB if unit == "GiB" else GB), source)

    tune: dict[str, Any] = {"rank": 8, "modules": QVO_MLP, "checkpointing": True}
    lora, qlora = (lora_step("llama3.1-8b", weights=weights, **tune) for weights in ("bf16", "nf4"))
    peft = "huggingface/peft method comparison, L40S, b=4, its longest batch taken as 745 tokens"
    rtx = "torchtune README, RTX 4090, b=2 S=2048, compiled"
    chunked = {"logit_fraction": CHUNKED_LOGITS}
    q_v, wide = lora_step("llama3.2-3b"), lora_step("llama3.2-3b", rank=64)
    mlp = lora_step("llama3.2-3b", rank=10, modules=MLP)
    gemma = lora_step(GEMMA3_270M, rank=8, modules=LINEAR_NAMES[:4], weights="fp32", precision="fp32")
    return [
        row("llama3.1-8b LoRA r8, checkpointing", "GiB", 16.2, lora.peak_bytes(2, 2048, **chunked), rtx),
        row("llama3.1-8b QLoRA r8, checkpointing", "GiB", 7.4, qlora.peak_bytes(2, 2048, **chunked), rtx),
        row("llama3.2-3b LoRA r32 q, v", "GB", 22.29, q_v.peak_bytes(4, 745), peft),
        row("llama3.2-3b LoRA r64 q, v", "GB", 22.55, wide.peak_bytes(4, 745), peft),
        row("llama3.2-3b LoRA r10 MLP", "GB", 24.70, mlp.peak_bytes(4, 745), peft),
        row("llama3.2-3b LoRA r32, resident after a step", "GB", 6.59,
            q_v.part_bytes("weights", "adapters", "optimizer", "gradients"), peft),
        row("gemma-3-270m weights, fp32", "GB", 1.069, gemma.part_bytes("weights"),
            "EdgeFlowerTune, resident memory of five phones"),
    ]  # fmt: skip


def _published_time() -> list[Row]:
    def row(kind: str, what: str, reference: float, step: Step, batch: int, tokens: int, on: str, source: str) -> Row:
        return Row(kind, f"{what} on {on}", "s/step", reference, step.seconds(batch, tokens, on), source)

    tune: dict[str, Any] = {"modules": QVO_MLP, "checkpointing": True}
    nano = lora_step(GEMMA3_270M, rank=8, modules=LINEAR_NAMES[:4], weights="fp32", precision="fp32")
    readme = "torchtune README, compiled"
    a100, rtx, orin = "server-a100", "server-rtx-4090", "jetson-agx-orin-64gb"
    return [
        row("calibrated", "llama3.2-3b LoRA r64, 2 x 4096", 0.998, lora_step("llama3.2-3b", rank=64, **tune),
            2, 4096, a100, readme),
        row("published", "llama3.2-3b QLoRA r64, 2 x 4096", 1.020,
            lora_step("llama3.2-3b", rank=64, weights="nf4", **tune), 2, 4096, a100, readme),
        row("calibrated", "llama3.1-8b LoRA r8, 2 x 2048", 1.329, lora_step("llama3.1-8b", rank=8, **tune),
            2, 2048, rtx, readme),
        row("published", "llama3.1-8b QLoRA r8, 2 x 2048", 1.698,
            lora_step("llama3.1-8b", rank=8, weights="nf4", **tune), 2, 2048, rtx, readme),
        row("calibrated", "llama3.2-3b LoRA r32, 4 x 210", 0.117, lora_step("llama3.2-3b"), 4, 210,
            "server-l40s", "huggingface/peft method comparison"),
        row("calibrated", "gemma-3-270m LoRA r8, 8 x 64, fp32", 12.4, nano, 8, 64, "jetson-nano",
            "EdgeFlowerTune, mean of three boards"),
        row("calibrated", "llama2-7b LoRA, 1 x 512", 512 / 550, lora_step("llama2-7b"), 1, 512, orin,
            "PockEngine, arXiv 2310.17752"),
    ]  # fmt: skip


def predicted(step: Measurement) -> float:
    """Peak bytes or seconds of somebody's step."""
    work = lora_step(
        step.model,
        modules=step.modules,
        rank=step.rank,
        weights=step.weights,
        precision=step.precision,
        checkpointing=step.checkpointing,
    )
    if step.step_seconds is not None:
        return work.seconds(step.batch_size, step.num_tokens, step.device)
    fraction = CHUNKED_LOGITS if step.chunked_loss else 1.0
    return work.peak_bytes(step.batch_size, step.num_tokens, logit_fraction=fraction)


def _measurements() -> list[Row]:
    out = []
    for step in MEASUREMENTS:
        source = f"{step.source}; {step.remark}" if step.remark else step.source
        if step.step_seconds is not None:
            what = f"{step.name} on {step.device}"
            out.append(Row("published", what, "s/step", step.step_seconds, predicted(step), source))
        elif step.peak_bytes is not None:
            out.append(Row("published", step.name, "GB", step.peak_bytes / GB, predicted(step) / GB, source))
    return out


def _uploads() -> list[Row]:
    def sent(rank: int) -> float:
        linears = [GEMMA3_270M.linears[name] for name in LINEAR_NAMES[:4]]
        return 4 * GEMMA3_270M.num_layers * rank * sum(num_in + num_out for num_in, num_out in linears)

    what = "gemma-3-270m LoRA r{} q, k, v, o, upload of a {}"
    return [
        Row("published", what.format(rank, sender), "B", seen, sent(rank), "EdgeFlowerTune")
        for rank, seen, sender in UPLOADS
    ]


def medians() -> dict[str, tuple[int, float]]:
    """Points and median error of what is published, by what was measured: memory, time, traffic."""
    kinds = {"GB": "memory", "GiB": "memory", "s/step": "time", "B": "traffic"}
    errors: dict[str, list[float]] = {}
    for row in rows():
        if row.kind == "published":
            errors.setdefault(kinds[row.unit], []).append(abs(row.error))
    return {kind: (len(found), float(np.median(found))) for kind, found in errors.items()}


@functools.cache
def rows() -> list[Row]:
    """All comparisons."""
    parts: tuple[Callable[[], list[Row]], ...] = (_published_memory, _published_time, _measurements, _uploads)
    return [row for part in parts for row in part()]


def table() -> str:
    """The comparisons as a Markdown table."""
    lines = ["| kind | what | measured | predicted | error | source |", "|---|---|---|---|---|---|"]
    for row in rows():
        values = f"{row.reference:.5g} {row.unit} | {row.predicted:.5g} | {row.error:+.1%}"
        lines.append(f"| {row.kind} | {row.what} | {values} | {row.source} |")
    found = [f"{kind} {error:.1%} ({points} points)" for kind, (points, error) in medians().items()]
    return "\n".join([*lines, "", f"Median error of what is published: {', '.join(found)}."])
