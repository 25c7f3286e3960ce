"""Predictions of the trace beside measurements of others: ``python -m fleetune.pricing`` prints the table.

Others measured Hugging Face's Llama with PEFT, torchtune, and engines of their own; the trace is of this project's code for the
same model, adapter and batch. Only rows whose source fitted nothing that their prediction uses are held out, and prove something.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fleetune.cost.estimate import seconds_of
from fleetune.cost.polynomials import evaluate, monomials
from fleetune.cost.recording import Recording
from fleetune.cost.trace import PARTS, StepTrace
from fleetune.cost.tracer import Tracer
from fleetune.files import default_cache_dir
from fleetune.fleet.devices import device
from fleetune.fleet.profile import DeviceProfile
from fleetune.methods.base import Context, Payload
from fleetune.methods.fedavg import FedIT, FedITConfig
from fleetune.models.architectures import ModelShape, architecture
from fleetune.models.config import LoRAConfig
from fleetune.models.network import linear_sites
from fleetune.models.outline import base_of
from fleetune.pricing.mapping import CostedModel
from fleetune.pricing.published import (
    BERT_BASE,
    FITTED,
    GEMMA3_270M,
    HELD_OUT,
    MEASUREMENTS,
    QKVO,
    QV,
    SAME_SOURCE,
    UPLOADS,
    Measurement,
)
from fleetune.pricing.tracing import Tracing, WorkShape
from fleetune.training.config import LocalConfig

GB = 1e9
# torchtune's cross-entropy in 8 chunks: the share of the logits' memory that is there at once (assumed: the 16-bit logits of
# all positions, 2 of 14 bytes each, and one chunk of the rest).
CHUNKED_LOGITS = (2 + 12 / 8) / 14


@dataclass(frozen=True)
class Row:
    """One comparison. ``kind`` is held out, same source or fitted (`pricing.published`), ``group`` what was measured."""

    kind: str
    group: str
    what: str
    unit: str
    reference: float
    predicted: float
    source: str
    remark: str = ""
    """Why it cannot be met closely, if that is known."""

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
        """Peak bytes of a step in which the fraction ``logit_fraction`` of the positions have logits."""
        basis = monomials([batch_size], [num_tokens], [batch_size * num_tokens * logit_fraction])
        return float(self.trace.peak(basis).sum())

    def part_bytes(self, *parts: str) -> float:
        """Bytes of parts of the memory whose size does not depend on the batch."""
        at_peak = dict(zip(PARTS, self.trace.peak(monomials([1], [1], [1]))[0], strict=True))
        return float(sum(at_peak[part] for part in parts))

    def flops(self, batch_size: int, num_tokens: int) -> float:
        """FLOPs of a step with logits at every position."""
        basis = monomials([batch_size], [num_tokens], [batch_size * num_tokens])
        return float(evaluate(self.trace.client.flops, basis)[0])

    def seconds(self, batch_size: int, num_tokens: int, on: DeviceProfile) -> float:
        """Seconds of a step with logits at every position."""
        basis = monomials([batch_size], [num_tokens], [batch_size * num_tokens])
        where = np.zeros(1, int)
        return float(seconds_of(self.trace.client, basis, self.precision, [on], where)[0])


@functools.cache
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


@functools.cache
def bert_step() -> Step:
    """Forward and backward of BERT-base in fp32, all weights trained, for 4 examples of 256 tokens.

    Both points of the recording are that batch, so the trace is the same for every batch.
    """
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder

    config = BertConfig()
    config._attn_implementation = "eager"
    with torch.device("meta"):
        embeddings, encoder = BertEmbeddings(config).eval(), BertEncoder(config).eval()
    tracer = Tracer(config.vocab_size)
    with tracer.running():
        hidden = embeddings(input_ids=torch.zeros(4, 256, dtype=torch.long))
        encoder(hidden).last_hidden_state.sum().backward()
    return Step(Recording.of((tracer, tracer), ([], []), ((0, 0), (0, 0))).trace(), "fp32")


def step_of(run: Measurement) -> Step:
    """The step that somebody measured, traced."""
    if run.model is BERT_BASE:
        return bert_step()
    return lora_step(
        run.model,
        modules=run.modules,
        rank=run.rank,
        weights=run.weights,
        precision=run.precision,
        checkpointing=run.checkpointing,
    )


def predicted(run: Measurement) -> float:
    """Bytes or seconds of somebody's step."""
    step = step_of(run)
    if run.step_seconds is not None:
        return step.seconds(run.batch_size, run.num_tokens, device(run.device))
    if run.resident_bytes is not None:
        return step.part_bytes("weights", "adapters", "optimizer", "gradients")
    fraction = CHUNKED_LOGITS if run.chunked_loss else 1.0
    return step.peak_bytes(run.batch_size, run.num_tokens, logit_fraction=fraction)


def _measurements() -> list[Row]:
    out = []
    for run in MEASUREMENTS:
        unit, scale = ("GB", GB) if run.step_seconds is None else ("s/step", 1.0)
        measured = run.step_seconds or run.peak_bytes or run.resident_bytes or math.nan
        numbers = measured / scale, predicted(run) / scale
        out.append(Row(run.kind, run.group, run.name, unit, *numbers, run.source, run.remark))
    return out


def _uploads() -> list[Row]:
    def sent(rank: int) -> float:
        linears = [GEMMA3_270M.linears[name] for name in QKVO]
        return 4 * GEMMA3_270M.num_layers * rank * sum(num_in + num_out for num_in, num_out in linears)

    what = "gemma-3-270m LoRA r{} q, k, v, o, upload of a {}"
    return [
        Row(HELD_OUT, "traffic", what.format(rank, sender), "B", seen, sent(rank), "EdgeFlowerTune")
        for rank, seen, sender in UPLOADS
    ]


def medians(kind: str = HELD_OUT) -> dict[str, tuple[int, float]]:
    """{what was measured: (number of rows of that kind, their median relative error)}."""
    errors: dict[str, list[float]] = {}
    for row in rows():
        found = errors.setdefault(row.group, [])
        if row.kind == kind:
            found.append(abs(row.error))
    return {group: (len(found), float(np.median(found)) if found else math.nan) for group, found in errors.items()}


@functools.cache
def rows() -> list[Row]:
    """All comparisons, by what was measured."""
    out = [*_measurements(), *_uploads()]
    groups = list(dict.fromkeys(row.group for row in out))
    return sorted(out, key=lambda row: groups.index(row.group))


def table() -> str:
    """The comparisons as a Markdown table, and their medians as another."""
    lines = ["| kind | what | measured | predicted | error | source |", "|---|---|---|---|---|---|"]
    for row in rows():
        values = f"{row.reference:.5g} {row.unit} | {row.predicted:.5g} | {row.error:+.1%}"
        source = f"{row.source}; {row.remark}" if row.remark else row.source
        lines.append(f"| {row.kind} | {row.what} | {values} | {source} |")
    lines += ["", "| median error (numbers) | held out | same source | fitted |", "|---|---|---|---|"]
    by_kind = [medians(kind) for kind in (HELD_OUT, SAME_SOURCE, FITTED)]
    for group in by_kind[0]:
        cells = [f"{error:.1%} ({number})" if number else "–" for number, error in (kind[group] for kind in by_kind)]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)
