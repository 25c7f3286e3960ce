"""Bytes moved and kernels started by one local step: what the roofline needs beside FLOPs.

Coefficients are fitted to the op list of a LLaMA2-7B LoRA step run eagerly on fake tensors (every op's
distinct inputs and outputs, no fusion, no cache), for 4, 8, 16 and 32 blocks and batches of 1 to 16 x 512
tokens. Bytes moved come out within 5 % there, 7 % too high with checkpointing, 11 % too low with all seven
linears adapted; kernels within 1 %, and 7 % too low with checkpointing. Fused kernels move less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fleetune.cost.memory import LINEAR_BYTES, layer_saved_bytes
from fleetune.cost.work import LocalWork

FORWARD_TRAFFIC = 7.0  # times the bytes that a block would keep, measured
BACKWARD_TRAFFIC = 12.0  # the same, measured
LOGITS_FORWARD_TRAFFIC = 14.0  # bytes per vocabulary entry and position, measured
LOGITS_BACKWARD_TRAFFIC = 26.0  # the same, measured
FORWARD_OPS, BACKWARD_OPS, STEP_OPS = 36.0, 62.0, 17.0  # per block, per block, per step; measured
LORA_FORWARD_OPS = 7.0  # per adapted linear, measured
LORA_BACKWARD_OPS = {False: 7.0, True: 12.0}  # True: adapters of another type than activations; measured


@dataclass(frozen=True)
class StepTraffic:
    """Bytes moved, ``fixed_bytes + b·S·(per_token + per_logit·logit_fraction)``, and kernels, in one step."""

    fixed_bytes: float
    dequantised_bytes: float  # read packed and written whole, beside the above
    per_token: float
    per_logit: float
    num_ops: float


@lru_cache(maxsize=4096)
def step_traffic(work: LocalWork) -> StepTraffic:
    """The traffic of one step on the client."""
    shape, layers = work.shape, work.client_layers
    lowest = work.lowest_trainable(layers)
    differentiated = range(lowest, layers.stop) if lowest is not None else range(0)
    forwards = work.forwards_per_step
    again = forwards + 1 if work.checkpointing else forwards  # forward runs of a differentiated block

    def over_blocks(cost_of: dict[int, float], backward: float, forward: float) -> float:
        return sum(
            cost * (forward * (again if layer in differentiated else forwards) + backward * (layer in differentiated))
            for layer, cost in cost_of.items()
        )

    saved = {layer: layer_saved_bytes(work, layer) for layer in layers}
    quantised = work.weight_dtype in ("int8", "nf4")
    stored = LINEAR_BYTES[work.weight_dtype]
    read = work.compute_bytes if quantised else stored
    passes = over_blocks({layer: float(shape.linear_params) for layer in layers}, 1, 1)
    targets = [t for t in work.lora_targets if t.layer in layers]
    lora_backward = LORA_BACKWARD_OPS[work.adapter_dtype != work.precision]
    with_head = work.split is None
    return StepTraffic(
        fixed_bytes=passes * read
        + with_head * work.compute_bytes * shape.embedding_params * (forwards + bool(differentiated)),
        dequantised_bytes=passes * (stored + work.compute_bytes) * quantised,
        per_token=over_blocks(saved, BACKWARD_TRAFFIC, FORWARD_TRAFFIC),
        per_logit=with_head
        * shape.vocab_size
        * (LOGITS_FORWARD_TRAFFIC * forwards + LOGITS_BACKWARD_TRAFFIC * bool(differentiated)),
        num_ops=over_blocks(dict.fromkeys(layers, 1.0), BACKWARD_OPS, FORWARD_OPS)
        + STEP_OPS
        + sum(LORA_FORWARD_OPS * forwards + lora_backward * (t.layer in differentiated) for t in targets),
    )
