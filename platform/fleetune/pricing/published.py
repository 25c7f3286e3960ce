"""Others' measurements of training steps, as data: the step, the device, and its bytes or seconds. `validation` predicts them.

Some of them fitted a constant of the cost model: the sustained fraction of the device that they ran on (`pricing.fit`), or the
length of PEFT's longest batch, which is not published. `Measurement.fits` marks these numbers. A prediction that uses a
constant fitted to its own source proves little, whether its number was fitted or is a sibling's: `Measurement.kind`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fleetune.models.architectures import ModelShape, architecture
from fleetune.models.config import LINEAR_NAMES

QV = ("q_proj", "v_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QVO_MLP = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HELD_OUT, SAME_SOURCE, FITTED = "held out", "same source", "fitted"
GIB = 2**30

# Encoder, fine-tuned whole: not of the families that can be costed, and there to fit two boards.
BERT_BASE = ModelShape("bert-base", 12, 768, 3072, 12, 12, 64, 30522, source="google-bert/bert-base-uncased")
GEMMA3_270M = ModelShape("gemma-3-270m", 18, 640, 2048, 4, 1, 256, 262144, True, source="google/gemma-3-270m")
# The first Qwen models, of the Llama kind with a bias on q, k and v; their intermediate_size counts gate and up together.
QWEN = {
    "1.8b": ModelShape("qwen-1.8b", 24, 2048, 5504, 16, 16, 128, 151936, qkv_bias=True, source="Qwen/Qwen-1_8B"),
    "7b": ModelShape("qwen-7b", 32, 4096, 11008, 32, 32, 128, 151936, qkv_bias=True, source="Qwen/Qwen-7B"),
    "14b": ModelShape("qwen-14b", 40, 5120, 13696, 40, 40, 128, 152064, qkv_bias=True, source="Qwen/Qwen-14B"),
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One training step that somebody measured: one of ``peak_bytes``, ``resident_bytes`` and ``step_seconds``."""

    model: ModelShape
    num_tokens: int
    source: str
    batch_size: int = 1
    modules: tuple[str, ...] = QV
    rank: int = 8
    weights: str = "bf16"
    precision: str = "bf16"
    checkpointing: bool = False
    chunked_loss: bool = False
    """Cross-entropy is computed in chunks, so that the logits of all positions are never in memory at once."""
    device: str = "server-a100"
    peak_bytes: float | None = None
    resident_bytes: float | None = None
    """Bytes that stay between steps: weights, adapters, gradients and the optimizer's state."""
    step_seconds: float | None = None
    fits: str = ""
    """The constant that this number fitted (alone or among others)."""
    remark: str = ""
    """Why it cannot be met closely, if that is known."""

    @property
    def name(self) -> str:
        """The step in a few words."""
        adapter = "QLoRA" if self.weights == "nf4" else "LoRA"
        way = "whole" if self.model is BERT_BASE else f"{adapter} r{self.rank}"
        again = ", checkpointing" if self.checkpointing else ""
        fp32 = ", fp32" if self.precision == "fp32" else ""
        resident = ", between steps" if self.resident_bytes else ""
        return f"{self.model.name} {way}{again}{fp32}, {self.batch_size} x {self.num_tokens}{resident} on {self.device}"

    @property
    def is_edge(self) -> bool:
        """True if the device is no server's GPU."""
        return not self.device.startswith("server-")

    @property
    def group(self) -> str:
        """What was measured, and where: medians of errors are taken by group."""
        if self.step_seconds is not None:
            return "time, edge" if self.is_edge else "time, servers"
        if self.weights == "nf4":
            return "memory, 4-bit"
        return "memory, edge" if self.is_edge else "memory, servers, 16-bit"

    @property
    def uses(self) -> set[str]:
        """The constants of its prediction that were fitted to measurements of any source."""
        if self.step_seconds is not None:
            return {self.device}
        return {LONGEST_BATCH} if self.num_tokens == PEFT_LONGEST and self.resident_bytes is None else set()

    @property
    def kind(self) -> str:
        """`FITTED`, `SAME_SOURCE` if its source fitted a constant that its prediction uses, else `HELD_OUT`."""
        if self.fits:
            return FITTED
        fitted = {other.fits for other in MEASUREMENTS if other.source == self.source}
        return SAME_SOURCE if self.uses & fitted else HELD_OUT


# {model: {tokens: (GB, seconds an iteration of 8 steps)}}
_QWEN_LORA: dict[str, dict[int, tuple[float, float]]] = {
    "1.8b": {512: (7.4, 1.0), 2048: (11.0, 1.7), 8192: (21.8, 6.8)},
    "7b": {512: (20.4, 1.5), 2048: (23.8, 5.2), 8192: (36.6, 21.3)},
    "14b": {512: (35.1, 2.4), 2048: (37.4, 8.4), 8192: (55.2, 36.0)},
}
_QWEN_QLORA: dict[str, dict[int, tuple[float, float]]] = {
    "1.8b": {512: (6.0, 1.4), 2048: (7.8, 2.0), 8192: (15.8, 6.5)},
    "7b": {512: (11.5, 3.0), 2048: (13.9, 7.0), 8192: (23.5, 22.3)},
    "14b": {512: (18.4, 6.3), 2048: (19.9, 11.8), 8192: (27.9, 38.3)},
}
_QWEN_README = "QwenLM/Qwen README @ 03cd81f, profiling of memory and speed: 8 steps an iteration"
_TORCHTUNE_README = "torchtune README, compiled"
_PEFT = "huggingface/peft method comparison"
_LITGPT = "litgpt tutorials/resource-tables.md @ 8641822, the longest of Alpaca"
_EDGE_FLOWER = "EdgeFlowerTune"
_POCK_ENGINE = "PockEngine, arXiv 2310.17752, its PyTorch LoRA"
_FED_NLP = "AutoFedNLP exps_data, forward and backward"

_SMALL = "the CUDA context is counted, and weighs on a small model"
_GPTQ = "GPTQ's Int4 with its own kernels, not NF4"
_OLD_NF4 = "bitsandbytes 0.41 kept the input of every frozen matrix"
_OFFLOADED = "adapters are in bf16 there, and kept activations wait in the CPU's memory"
_FP32 = "read as fp32 (its memory is that), q and v, r8: not told"
_PROCESS = "the mean of the whole process, in an engine written for phones"
LONGEST_BATCH = "the tokens of PEFT's longest batch"
PEFT_LONGEST = 745
"""Fitted to one peak of PEFT's comparison, with an earlier model of memory; it is not published."""


def _qwen() -> list[Measurement]:
    """Sequences of one example, on an A100 of 80 GB, PyTorch 2.0, FlashAttention 2."""
    out = []
    for weights, table in (("bf16", _QWEN_LORA), ("nf4", _QWEN_QLORA)):
        for size, points in table.items():
            for num_tokens, (gigabytes, seconds) in points.items():
                run = Measurement(
                    model=QWEN[size], num_tokens=num_tokens, source=_QWEN_README, modules=LINEAR_NAMES, rank=64,
                    weights=weights, checkpointing=True, remark=_GPTQ if weights == "nf4" else "",
                )  # fmt: skip
                fits = run.device if weights == "bf16" else ""
                small = _SMALL if size == "1.8b" else ""
                remark = "; ".join(part for part in (run.remark, small) if part)
                out.append(replace(run, peak_bytes=gigabytes * 1e9, remark=remark))
                out.append(replace(run, step_seconds=seconds / 8, fits=fits))
    return out


def _litgpt(model: str, gigabytes: float, *, batch_size: int = 1, weights: str = "bf16") -> Measurement:
    return Measurement(
        model=architecture(model), num_tokens=1304, batch_size=batch_size, weights=weights, device="server-a100-40gb",
        peak_bytes=gigabytes * 1e9, source=_LITGPT, remark=_OLD_NF4 if weights == "nf4" else "",
    )  # fmt: skip


def _torchtune(weights: str) -> tuple[Measurement, Measurement]:
    """LoRA steps with checkpointing on an A100 and on an RTX 4090, without what they took."""
    a100 = Measurement(
        model=architecture("llama3.2-3b"), num_tokens=4096, batch_size=2, modules=QVO_MLP, rank=64, weights=weights,
        checkpointing=True, chunked_loss=True, source=_TORCHTUNE_README,
    )  # fmt: skip
    rtx = replace(a100, model=architecture("llama3.1-8b"), num_tokens=2048, rank=8, device="server-rtx-4090")
    return a100, rtx


def _all_of_torchtune() -> list[Measurement]:
    (a100, rtx), (a100_q, rtx_q) = _torchtune("bf16"), _torchtune("nf4")
    return [
        replace(rtx, peak_bytes=16.2 * GIB),
        replace(rtx_q, peak_bytes=7.4 * GIB),
        replace(a100, peak_bytes=8.5 * GIB, remark=_OFFLOADED),
        replace(a100_q, peak_bytes=4.6 * GIB, remark=_OFFLOADED),
        replace(a100, step_seconds=0.998),
        replace(a100_q, step_seconds=1.020),
        replace(rtx, step_seconds=1.329),
        replace(rtx_q, step_seconds=1.698),
    ]


def _peft(modules: tuple[str, ...], rank: int, gigabytes: float, tokens_per_second: float) -> list[Measurement]:
    """Peak in the longest batch; seconds of a mean one: 4 examples of 210 tokens."""
    run = Measurement(
        model=architecture("llama3.2-3b"), num_tokens=PEFT_LONGEST, batch_size=4, modules=modules, rank=rank,
        device="server-l40s", source=_PEFT,
    )  # fmt: skip
    seconds = 4 * 210 / tokens_per_second
    return [
        replace(run, peak_bytes=gigabytes * 1e9, fits=LONGEST_BATCH if rank == 32 else ""),
        replace(run, num_tokens=210, step_seconds=seconds, fits=run.device),
    ]


def _on_boards() -> list[Measurement]:
    gemma = Measurement(
        model=GEMMA3_270M, num_tokens=64, batch_size=8, modules=QKVO, weights="fp32", precision="fp32",
        source=_EDGE_FLOWER, device="jetson-nano",
    )  # fmt: skip
    phone = replace(gemma, device="phone-snapdragon-778g")
    orin = Measurement(
        model=architecture("llama2-7b"), num_tokens=512, weights="fp32", precision="fp32", source=_POCK_ENGINE,
        device="jetson-agx-orin-64gb", remark=_FP32,
    )  # fmt: skip
    bert = Measurement(
        model=BERT_BASE, num_tokens=256, batch_size=4, weights="fp32", precision="fp32", source=_FED_NLP,
        device="jetson-tx2",
    )  # fmt: skip
    pi = replace(bert, device="raspberry-pi-4-4gb")
    return [
        replace(phone, peak_bytes=1.069e9, remark=_PROCESS),
        replace(orin, peak_bytes=30.9e9),
        replace(orin, step_seconds=7.3),
        replace(gemma, step_seconds=12.4, fits=gemma.device),  # three boards: 11.4, 14.1 and 11.8
        replace(phone, step_seconds=172.3, fits=phone.device),  # five phones: 170.2 to 174.4
        replace(bert, step_seconds=1.70, fits=bert.device),
        replace(pi, step_seconds=34.02, fits=pi.device),
    ]


MEASUREMENTS: tuple[Measurement, ...] = (
    *_all_of_torchtune(),
    *_peft(QV, 32, 22.29, 7174),
    *_peft(QV, 64, 22.55, 7062),
    *_peft(MLP, 10, 24.70, 6309),
    replace(_peft(QV, 32, 22.29, 7174)[0], peak_bytes=None, resident_bytes=6.59e9, fits=""),
    *_qwen(),
    _litgpt("llama2-7b", 21.30),
    _litgpt("llama2-7b", 29.07, batch_size=2),
    _litgpt("llama2-7b", 13.84, weights="nf4"),
    _litgpt("llama2-13b", 38.12),
    _litgpt("llama2-13b", 22.55, weights="nf4"),
    *_on_boards(),
)
# Bytes that clients were seen to upload: Gemma-3-270M, LoRA on q, k, v and o in fp32, by rank (EdgeFlowerTune). The phones'
# files hold 80 bytes of header for each of the 144 tensors, the Jetsons' message none.
UPLOADS: tuple[tuple[int, int, str], ...] = (
    (4, 1_486_080, "phone"),
    (8, 2_960_640, "phone"),
    (16, 5_909_760, "phone"),
    (8, 2_949_120, "Jetson"),
)
