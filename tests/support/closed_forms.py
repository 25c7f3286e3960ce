"""FLOPs, weights and saved activations of a LoRA step in closed form: written down by hand, to check the trace against.

They know this project's block (fused norms and rotations, SwiGLU, flash attention) and LoRA on every block; nothing else.
A linear layer costs 2 in out per token forward; backward through frozen weights costs the same once more. A LoRA pair costs
2 r (in + out) forward, and twice that backward. Attention costs 4 a d S per token forward (scores and values, no causal
saving) and 2.5 times that backward, because flash attention computes the scores again. Nothing below the lowest adapter needs
a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

from fleetune.models.architectures import ModelShape

FLASH_BACKWARD = 2.5  # dV, dP, dQ, dK and the recomputed scores: five products against two forward
STAGE = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def _linears(shape: ModelShape, names: Iterable[str]) -> int:
    return sum(num_in * num_out for num_in, num_out in (shape.linears[name] for name in names))


def step_flops(
    shape: ModelShape, modules: tuple[str, ...], *, rank: int, checkpointing: bool, batch: int, tokens: int, logits: int
) -> int:
    """FLOPs of one training step of B examples of S tokens with M logit positions."""
    t, blocks = batch * tokens, shape.num_layers
    linears = 2 * t * _linears(shape, shape.linears)
    lora_a = 2 * t * rank * sum(shape.linears[m][0] for m in modules)
    lora_b = 2 * t * rank * sum(shape.linears[m][1] for m in modules)
    attention = 4 * t * tokens * shape.num_heads * shape.head_dim
    head = 2 * logits * shape.vocab_size * shape.hidden_size
    forward = linears + lora_a + lora_b + attention
    backward = linears + 2 * (lora_a + lora_b) + int(FLASH_BACKWARD * attention)

    first = min(STAGE[m] for m in modules)  # in the lowest block, what lies before its first adapter needs no gradient
    before = [m for m in shape.linears if STAGE[m] <= first]
    spared = 2 * t * _linears(shape, before) + 2 * t * rank * sum(shape.linears[m][0] for m in modules if m in before)
    spared += int(FLASH_BACKWARD * attention) if first > 0 else 0
    return blocks * (forward + backward + forward * checkpointing) - spared + 2 * head


def weights_bytes(shape: ModelShape, weights: str, precision: str) -> int:
    """Bytes of the frozen weights; beside quantised linears the tables are in ``precision``. Rotary frequencies included."""
    other = DTYPE_BYTES[weights if weights in DTYPE_BYTES else precision]
    block = 4 * shape.other_layer_params  # norms and biases are not rounded
    for num_in, num_out in shape.linears.values():
        num = num_in * num_out
        if weights == "nf4":  # 4 bits, 8-bit scales of 64, fp32 scales of 256 of those, and bitsandbytes' tables
            block += num // 2 + -(-num // 64) + 4 * -(-num // (64 * 256)) + 4 * (256 + 16 + 1)
        else:
            block += num * DTYPE_BYTES[weights]
    tables = 1 if shape.tied_embeddings else 2
    return (
        shape.num_layers * block
        + other * tables * shape.embedding_params
        + 4 * (shape.hidden_size + shape.head_dim // 2)
    )


def saved_bytes(shape: ModelShape, *, rank: int, batch: int, tokens: int, logits: int) -> int:
    """Bytes that autograd keeps of an fp32 step with adapters on all linears, for a shape without biases and head norms.

    Of every block and token: the inputs and 1 / rms of two norms and their outputs (which the adapters read), q, k, v,
    attention's output and log-sum-exp, gate, silu(gate), up and their product, and the rank-r middle of seven adapters. The
    lowest block's first norm keeps nothing of its own, because the embedding needs no gradient; the last norm keeps 1 / rms of
    the gathered positions and those positions' input. Then the log-softmax; of every such position its place, its target and
    its owner as int64 and its loss; cosines and sines of every place; the number of counted tokens, and the mean.
    """
    h, i = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    per_token = 4 * (2 * (h + 1) + 2 * h + 2 * q + 2 * kv + shape.num_heads + 4 * i + 7 * rank)
    per_logit = 4 * (h + 1) + 4 * shape.vocab_size + 3 * 8 + 4
    rest = 8 * shape.head_dim * tokens + 12
    return batch * tokens * (shape.num_layers * per_token - 4 * (h + 1)) + logits * per_logit + rest
