"""Others' measurements of LoRA steps, as data: what was run, on what, and what it took. `validation` predicts them all.

None of these numbers fitted a constant of the cost model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fleetune.cost.shapes import LINEARS, ModelShape

QV = ("q_proj", "v_proj")
QVO_MLP = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One LoRA step that somebody measured. ``peak_bytes`` or ``step_seconds`` of a step of ``batch_size`` examples."""

    model: str | ModelShape
    num_tokens: int
    source: str
    batch_size: int = 1
    modules: tuple[str, ...] = QV
    rank: int = 8
    weights: str = "bf16"
    precision: str = "bf16"
    checkpointing: bool = False
    chunked_loss: bool = False
    """Cross-entropy in chunks: the logits of all positions are never there at once."""
    device: str = "server-a100"
    peak_bytes: float | None = None
    step_seconds: float | None = None
    remark: str = ""
    """Why it cannot be met closely, where that is known."""

    @property
    def name(self) -> str:
        """In a few words."""
        model = self.model if isinstance(self.model, str) else self.model.name
        adapter = "QLoRA" if self.weights == "nf4" else "LoRA"
        again = ", checkpointing" if self.checkpointing else ""
        return f"{model} {adapter} r{self.rank}{again}, {self.batch_size} x {self.num_tokens}"


# The first Qwen models, of the Llama kind with a bias on q, k and v; their intermediate_size counts gate and up together.
QWEN = {
    "1.8b": ModelShape("qwen-1.8b", 24, 2048, 5504, 16, 16, 128, 151936, qkv_bias=True, source="Qwen/Qwen-1_8B"),
    "7b": ModelShape("qwen-7b", 32, 4096, 11008, 32, 32, 128, 151936, qkv_bias=True, source="Qwen/Qwen-7B"),
    "14b": ModelShape("qwen-14b", 40, 5120, 13696, 40, 40, 128, 152064, qkv_bias=True, source="Qwen/Qwen-14B"),
}
_QWEN_README = "QwenLM/Qwen README, profiling of memory and speed: A100 80GB, 8 steps an iteration"
# {model: {tokens: (GB, seconds an iteration of 8 steps)}}
_QWEN_LORA: dict[str, dict[int, tuple[float, float]]] = {
    "1.8b": {512: (7.4, 1.0), 2048: (11.0, 1.7), 8192: (21.8, 6.8)},
    "7b": {512: (20.4, 1.5), 2048: (23.8, 5.2), 8192: (36.6, 21.3)},
    "14b": {512: (35.1, 2.4), 2048: (37.4, 8.4), 8192: (55.2, 36.0)},
}
_SMALL = "the CUDA context is counted, and weighs on a small model"
_LITGPT = "litgpt tutorials/resource-tables.md @ 8641822: A100 40GB, the longest of Alpaca"
_OLD_NF4 = "bitsandbytes 0.41 kept the input of every frozen matrix"


def _qwen() -> list[Measurement]:
    out = []
    for size, points in _QWEN_LORA.items():
        for num_tokens, (gigabytes, seconds) in points.items():
            run: dict[str, Any] = {"model": QWEN[size], "num_tokens": num_tokens, "source": _QWEN_README}
            run |= {"modules": LINEARS, "rank": 64, "checkpointing": True}
            out.append(Measurement(**run, peak_bytes=gigabytes * 1e9, remark=_SMALL if size == "1.8b" else ""))
            out.append(Measurement(**run, step_seconds=seconds / 8))
    return out


def _litgpt(model: str, gigabytes: float, *, batch_size: int = 1, weights: str = "bf16") -> Measurement:
    return Measurement(
        model=model, num_tokens=1304, batch_size=batch_size, weights=weights, peak_bytes=gigabytes * 1e9, source=_LITGPT,
        remark=_OLD_NF4 if weights == "nf4" else "",
    )  # fmt: skip


def _torchtune(weights: str, gibibytes: float) -> Measurement:
    return Measurement(
        model="llama3.2-3b", num_tokens=4096, batch_size=2, modules=QVO_MLP, rank=64, weights=weights, checkpointing=True,
        chunked_loss=True, peak_bytes=gibibytes * 2**30, source="torchtune README, A100, compiled",
        remark="adapters are in bf16 there, and kept activations wait in the CPU's memory",
    )  # fmt: skip


def _peft(modules: tuple[str, ...], rank: int, tokens_per_second: float) -> Measurement:
    """4 examples of 210 tokens on average."""
    return Measurement(
        model="llama3.2-3b", num_tokens=210, batch_size=4, modules=modules, rank=rank, device="server-l40s",
        step_seconds=4 * 210 / tokens_per_second, source="huggingface/peft method comparison, L40S",
    )  # fmt: skip


MEASUREMENTS: tuple[Measurement, ...] = (
    *_qwen(),
    _litgpt("llama2-7b", 21.30),
    _litgpt("llama2-7b", 29.07, batch_size=2),
    _litgpt("llama2-7b", 13.84, weights="nf4"),
    _litgpt("llama2-13b", 38.12),
    _litgpt("llama2-13b", 22.55, weights="nf4"),
    _torchtune("bf16", 8.5),
    _torchtune("nf4", 4.6),
    _peft(QV, 64, 7062),
    _peft(MLP, 10, 6309),
)
# Bytes that clients were seen to upload: Gemma-3-270M, LoRA on q, k, v and o in fp32, by rank (EdgeFlowerTune). The phones'
# files hold 80 bytes of header for each of the 144 tensors, the Jetsons' message none.
UPLOADS: tuple[tuple[int, int, str], ...] = (
    (4, 1_486_080, "phone"),
    (8, 2_960_640, "phone"),
    (16, 5_909_760, "phone"),
    (8, 2_949_120, "Jetson"),
)
