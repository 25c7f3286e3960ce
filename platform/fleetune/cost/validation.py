"""The closed forms beside traced and published numbers: ``python -m fleetune.cost`` prints the table.

Traced rows are training steps of Hugging Face's Llama with PEFT's LoRA, run on fake tensors (torch 2.13,
transformers 5.23, peft 0.21): peak live bytes of the second step. Published rows are measurements of others
on real GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.cost.estimate import activation_bytes, estimate
from fleetune.cost.flops import client_flops
from fleetune.cost.memory import layer_saved_bytes, memory_need
from fleetune.cost.published import MEASUREMENTS, UPLOADS, Measurement
from fleetune.cost.shapes import LINEARS, ModelShape, architecture
from fleetune.cost.work import LocalWork, lora_targets
from fleetune.fleet.devices import device

GB, GIB = 1e9, 2**30
QV = ("q_proj", "v_proj")
QVO_MLP = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# torchtune's cross-entropy in 8 chunks holds the 16-bit logits (2 bytes each) and one chunk's share of the
# other 12 of 14.
CHUNKED_LOGITS = (2 + 12 / 8) / 14
GEMMA3_270M = ModelShape("gemma-3-270m", 18, 640, 2048, 4, 1, 256, 262144, True, source="google/gemma-3-270m")


@dataclass(frozen=True)
class Row:
    """One comparison.

    ``kind``: ``traced``, ``published``, or ``calibrated`` where the model was fitted to the number.
    """

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


def lora_work(
    model: str | ModelShape,
    *,
    modules: tuple[str, ...] = QV,
    rank: int = 32,
    num_layers: int | None = None,
    batch_size: int = 1,
    **options: Any,
) -> LocalWork:
    """LoRA on ``modules`` of every block of a model, or of a submodel of ``num_layers`` blocks."""
    shape = architecture(model) if isinstance(model, str) else model
    blocks = num_layers or shape.num_layers
    held = options.get("split") or blocks
    targets = lora_targets(shape, modules, rank=rank, layers=range(blocks))
    elements = sum(t.rank * (t.in_features + t.out_features) for t in targets if t.layer < held)
    return LocalWork(
        shape=shape, num_layers=blocks, trainable_layers=tuple(range(blocks)), adapter_elements=elements,
        trainable_elements=elements, lora_targets=targets, batch_size=batch_size, **options,
    )  # fmt: skip


def peak_bytes(work: LocalWork, num_tokens: int, *, logit_fraction: float = 1.0) -> float:
    """Peak bytes of a step on examples of ``num_tokens`` tokens."""
    return float(_one(work, num_tokens, "server-a100", logit_fraction=logit_fraction).peak_memory_bytes[0])


def step_seconds(work: LocalWork, num_tokens: float, device_name: str) -> float:
    """Seconds of a step on examples of ``num_tokens`` tokens."""
    return float(_one(work, num_tokens, device_name).compute_seconds[0])


def _one(work: LocalWork, num_tokens: float, device_name: str, *, logit_fraction: float = 1.0) -> Any:
    return estimate(
        work, devices=[device(device_name)], device_index=np.zeros(1, int), num_steps=1,
        mean_tokens=num_tokens, max_tokens=num_tokens, logit_fraction=logit_fraction,
        downlink_bytes=0, uplink_bytes=0, down_bps=1e6, up_bps=1e6, latency_seconds=0,
    )  # fmt: skip


def _traced_memory() -> list[Row]:
    low, nf4, ckpt = {"adapter_dtype": "bf16"}, {"weight_dtype": "nf4"}, {"checkpointing": True}
    cases: list[tuple[str, str, dict[str, Any], dict[int, float]]] = [
        ("bf16", "llama2-7b", {}, {1: 16.607, 4: 25.393, 16: 60.535}),
        ("bf16, bf16 adapters", "llama2-7b", low, {1: 16.102, 4: 23.673, 16: 53.958}),
        ("bf16, checkpointing", "llama2-7b", ckpt, {1: 14.050, 4: 15.166, 16: 19.630}),
        ("nf4", "llama2-7b", nf4, {1: 6.996, 4: 15.781, 16: 50.924}),
        ("nf4, bf16 adapters, checkpointing", "llama2-7b", {**nf4, **low, **ckpt},
         {1: 4.34, 4: 5.45, 16: 9.92}),
        ("bf16, all linears", "llama2-7b", {"modules": LINEARS}, {1: 19.17, 4: 33.37, 16: 90.18}),
        ("bf16, all linears, bf16 adapters", "llama2-7b", {"modules": LINEARS, **low}, {4: 26.05}),
        ("bf16, all linears, checkpointing", "llama2-7b", {"modules": LINEARS, **ckpt}, {4: 15.92}),
        ("bf16, 16 blocks", "llama2-7b", {"num_layers": 16}, {1: 8.680, 4: 13.417, 16: 32.365}),
        ("bf16, 8 blocks", "llama2-7b", {"num_layers": 8}, {1: 4.717, 4: 7.429, 16: 18.280}),
        ("bf16, 4 blocks", "llama2-7b", {"num_layers": 4}, {1: 2.736, 4: 4.436, 16: 11.237}),
        ("nf4, 8 blocks", "llama2-7b", {"num_layers": 8, **nf4}, {1: 2.314, 4: 5.027, 16: 15.877}),
        ("nf4, 4 blocks", "llama2-7b", {"num_layers": 4, **nf4}, {1: 1.534, 4: 3.234, 16: 10.036}),
        ("bf16, split client of 8 blocks", "llama2-7b", {"split": 8}, {1: 4.268, 4: 6.418, 16: 15.019}),
        ("nf4, split client of 8 blocks", "llama2-7b", {"split": 8, **nf4}, {1: 1.937, 4: 4.033, 16: 12.616}),
        ("bf16", "llama2-13b", {}, {4: 44.2}),
        ("nf4", "llama2-13b", nf4, {4: 25.3}),
        ("bf16", "llama3.1-8b", {}, {4: 31.2}),
        ("nf4", "llama3.1-8b", nf4, {4: 20.8}),
        ("bf16", "llama3.2-3b", {}, {4: 16.8}),
        ("nf4", "llama3.2-3b", nf4, {4: 12.6}),
        ("bf16", "tinyllama-1.1b", {}, {4: 6.6}),
        ("nf4", "tinyllama-1.1b", nf4, {4: 5.2}),
    ]  # fmt: skip
    return [
        Row("traced", f"{model}, {what}, b={batch} S=512", "GB", reference,
            peak_bytes(lora_work(model, batch_size=batch, **options), 512) / GB, "fake tensors")
        for what, model, options, peaks in cases
        for batch, reference in peaks.items()
    ]  # fmt: skip


def _traced_work() -> list[Row]:
    def flops(**options: Any) -> float:
        step = client_flops(lora_work("llama2-7b", **options))
        return 512 * (step.per_token + step.per_token_pair * 512 + step.per_logit)

    def saved(**options: Any) -> float:
        return layer_saved_bytes(lora_work("llama2-7b", **options), 0)

    seven, low = {"modules": LINEARS}, {"adapter_dtype": "bf16"}
    cases: list[tuple[str, str, float, float]] = [
        ("forward and backward", "FLOP", 14012062367744, flops()),
        ("forward only", "FLOP", 6920266055680, flops(passes="forward")),
        ("checkpointing", "FLOP", 19372449988608, flops(checkpointing=True)),
        ("4 blocks", "FLOP", 1941056782336, flops(num_layers=4)),
        ("saved per token and block, q and v", "B", 164744, saved()),
        ("saved per token and block, bf16 adapters", "B", 140040, saved(**low)),
        ("saved per token and block, all linears", "B", 274952, saved(**seven)),
    ]
    return [
        Row("traced", f"llama2-7b, {what}, b=1 S=512", unit, reference, predicted, "fake tensors")
        for what, unit, reference, predicted in cases
    ]


def _published_memory() -> list[Row]:
    def row(what: str, unit: str, reference: float, predicted: float, source: str, kind: str = "published") -> Row:
        return Row(kind, what, unit, reference, predicted / (GIB if unit == "GiB" else GB), source)

    tune: dict[str, Any] = {
        "rank": 8,
        "modules": QVO_MLP,
        "adapter_dtype": "bf16",
        "checkpointing": True,
        "batch_size": 2,
    }
    lora, qlora = lora_work("llama3.1-8b", **tune), lora_work("llama3.1-8b", weight_dtype="nf4", **tune)
    peft = "huggingface/peft method comparison, L40S, b=4, its longest batch taken as 745 tokens"
    rtx = "torchtune README, RTX 4090, b=2 S=2048, compiled"
    padded: dict[str, Any] = {"batch_size": 4, "padding_mask": True}
    q_v, wide = lora_work("llama3.2-3b", **padded), lora_work("llama3.2-3b", rank=64, **padded)
    mlp, need = lora_work("llama3.2-3b", rank=10, modules=MLP, **padded), memory_need(q_v)
    held = need.weights_bytes + need.adapter_bytes + need.gradient_bytes + need.optimizer_bytes
    return [
        row("llama3.1-8b LoRA r8, checkpointing", "GiB", 16.2, _chunked(lora), rtx),
        row("llama3.1-8b QLoRA r8, checkpointing", "GiB", 7.4, _chunked(qlora), rtx),
        row("llama3.2-3b LoRA r32 q, v", "GB", 22.29, peak_bytes(q_v, 745), peft, "calibrated"),
        row("llama3.2-3b LoRA r64 q, v", "GB", 22.55, peak_bytes(wide, 745), peft),
        row("llama3.2-3b LoRA r10 MLP", "GB", 24.70, peak_bytes(mlp, 745), peft),
        row("llama3.2-3b LoRA r32, resident after a step", "GB", 6.59, held, peft),
        row("gemma-3-270m weights, fp32", "GB", 1.069, 4.0 * GEMMA3_270M.num_params(),
            "EdgeFlowerTune, resident memory of five phones"),
    ]  # fmt: skip


def _chunked(work: LocalWork) -> float:
    need = memory_need(work)
    activations = activation_bytes(need, np.array(2048.0), np.array(CHUNKED_LOGITS), batch_size=work.batch_size)
    return need.weights_bytes + need.adapter_bytes + need.optimizer_bytes + float(activations)


def _published_time() -> list[Row]:
    def row(kind: str, what: str, reference: float, work: LocalWork, tokens: float, on: str, source: str) -> Row:
        return Row(kind, f"{what} on {on}", "s/step", reference, step_seconds(work, tokens, on), source)

    tune: dict[str, Any] = {
        "modules": QVO_MLP,
        "adapter_dtype": "bf16",
        "checkpointing": True,
        "batch_size": 2,
    }
    nano = lora_work(GEMMA3_270M, rank=8, modules=LINEARS[:4], batch_size=8, weight_dtype="fp32", precision="fp32")
    readme = "torchtune README, compiled"
    return [
        row("calibrated", "llama3.2-3b LoRA r64, 2 x 4096", 0.998, lora_work("llama3.2-3b", rank=64, **tune),
        4096,
            "server-a100", readme),
        row("calibrated", "llama3.2-3b QLoRA r64, 2 x 4096", 1.020,
            lora_work("llama3.2-3b", rank=64, weight_dtype="nf4", **tune), 4096, "server-a100", readme),
        row("calibrated", "llama3.1-8b LoRA r8, 2 x 2048", 1.329, lora_work("llama3.1-8b", rank=8, **tune),
        2048,
            "server-rtx-4090", readme),
        row("published", "llama3.1-8b QLoRA r8, 2 x 2048", 1.698,
            lora_work("llama3.1-8b", rank=8, weight_dtype="nf4", **tune), 2048, "server-rtx-4090", readme),
        row("calibrated", "llama3.2-3b LoRA r32, 4 x 210", 0.117, lora_work("llama3.2-3b", batch_size=4), 210,
            "server-l40s", "huggingface/peft method comparison"),
        row("calibrated", "gemma-3-270m LoRA r8, 8 x 64, fp32", 12.4, nano, 64, "jetson-nano",
            "EdgeFlowerTune, mean of three boards"),
        row("calibrated", "llama2-7b LoRA, 1 x 512", 512 / 550, lora_work("llama2-7b"), 512,
        "jetson-agx-orin-64gb",
            "PockEngine, arXiv 2310.17752"),
    ]  # fmt: skip


def predicted(step: Measurement) -> float:
    """Peak bytes or seconds of somebody's step."""
    work = lora_work(
        step.model,
        modules=step.modules,
        rank=step.rank,
        batch_size=step.batch_size,
        weight_dtype=step.weights,
        precision=step.precision,
        checkpointing=step.checkpointing,
    )
    if step.step_seconds is not None:
        return step_seconds(work, step.num_tokens, step.device)
    return peak_bytes(work, step.num_tokens, logit_fraction=CHUNKED_LOGITS if step.chunked_loss else 1.0)


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
        linears = [GEMMA3_270M.linears[name] for name in LINEARS[:4]]
        return 4 * GEMMA3_270M.num_layers * rank * sum(num_in + num_out for num_in, num_out in linears)

    return [
        Row(
            "published",
            f"gemma-3-270m LoRA r{rank} q, k, v, o, upload of a {sender}",
            "B",
            seen,
            sent(rank),
            "EdgeFlowerTune",
        )
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


def rows() -> list[Row]:
    """All comparisons."""
    parts: tuple[Callable[[], list[Row]], ...] = (
        _traced_work,
        _traced_memory,
        _published_memory,
        _published_time,
        _measurements,
        _uploads,
    )
    return [row for part in parts for row in part()]


def table() -> str:
    """The comparisons as a Markdown table."""
    lines = ["| kind | what | reference | closed form | error | source |", "|---|---|---|---|---|---|"]
    for row in rows():
        values = f"{row.reference:.5g} {row.unit} | {row.predicted:.5g} | {row.error:+.1%}"
        lines.append(f"| {row.kind} | {row.what} | {values} | {row.source} |")
    found = [f"{kind} {error:.1%} ({points} points)" for kind, (points, error) in medians().items()]
    return "\n".join([*lines, "", f"Median error of what is published: {', '.join(found)}."])
