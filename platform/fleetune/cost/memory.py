"""Peak memory of one client in closed form: weights, adapters, optimizer states, activations, logits.

The peak stands where backward begins: all that is resident, the activations of every differentiated block,
and the logits with their gradient. Activations are those that autograd keeps for Hugging Face's Llama with
flash attention, without dropout; the formulas equal what ``torch.autograd.graph.saved_tensors_hooks`` sees.
Coefficients marked "measured" were read off the live bytes of such a step, at hidden sizes 256 and 4096.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fleetune.cost.flops import STAGE
from fleetune.cost.work import DTYPE_BYTES, LocalWork, LoraTarget

# Bytes per quantised weight. NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section
# 3): 4 bits, an 8-bit scale per 64 weights, and an fp32 scale per 256 of those. int8: one byte; its fp32
# scale per row is added below.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
LINEAR_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": NF4_BYTES}
# Bytes per vocabulary entry and position, measured: logits, fp32 log-softmax (kept), and two fp32 gradients
# at the start of backward; a forward pass alone holds the logits, their fp32 copy where they are 16-bit, and
# the log-softmax.
LOGITS_TRAIN_BYTES = {"bf16": 14, "fp32": 16}
LOGITS_FORWARD_BYTES = {"bf16": 10, "fp32": 8}
NORM_BACKWARD_BYTES = 20  # per hidden unit and token while a norm is differentiated in fp32, measured
INPUT_OF = {
    "q_proj": "norm1", "k_proj": "norm1", "v_proj": "norm1", "o_proj": "attention",
    "gate_proj": "norm2", "up_proj": "norm2", "down_proj": "gated",
}  # fmt: skip


@dataclass(frozen=True)
class MemoryNeed:
    """Coefficients of one client's bytes; ``cost.estimate.activation_bytes`` puts the last six together."""

    weights_bytes: float
    adapter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    kept_per_token: float
    kept_per_token_pair: float  # the padding mask: times b·S²
    logits_per_token: float
    outputs_per_token: float  # of the logits, what stays alive while blocks are differentiated
    block_per_token: float
    dequantised_bytes: float
    dequantised_per_token: float


def layer_saved_bytes(work: LocalWork, layer: int) -> float:
    """Bytes that autograd keeps of one block, per token.

    Norms, attention, SwiGLU, and its trainable adapters.
    """
    shape, c = work.shape, work.compute_bytes
    h, q, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norms = 2 * (4 * h + 4)  # fp32 inputs and reciprocal deviations
    if shape.qk_norm:
        norms += 4 * (q + kv) + 4 * (shape.num_heads + shape.num_kv_heads)
    keys = q if work.padding_mask else kv  # with a mask, transformers repeats keys and values for every head
    attention = c * (2 * q + 2 * keys) + 4 * shape.num_heads  # q, output, k, v; fp32 log-sum-exp
    return norms + attention + 3 * c * shape.intermediate_size + _lora_saved_bytes(work, layer)


def _not_kept(work: LocalWork, layer: int) -> float:
    """What the lowest trainable block does not keep per token: all that lies before its first adapter.

    Its first norm is left out of this count, as the model's last norm, which is kept, is of the same size.
    """
    shape, c = work.shape, work.compute_bytes
    adapted = {t.module for t in work.lora_targets if t.layer == layer}
    first = min((STAGE[module] for module in adapted), default=0)
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    head_norms = {"q_proj": 4 * (q + shape.num_heads), "k_proj": 4 * (kv + shape.num_kv_heads)}
    unnormed = sum(size for module, size in head_norms.items() if shape.qk_norm and module not in adapted)
    if first == 0:
        return unnormed
    output = q if first == 1 and work.adapter_dtype == work.precision else 0  # kept by the adapter on o
    attention = c * (2 * q + 2 * (q if work.padding_mask else kv) - output) + 4 * shape.num_heads
    norm = 4 * shape.hidden_size + 4 if first >= 2 else 0
    return unnormed + attention + norm + (3 * c * shape.intermediate_size if first == 3 else 0)


def _lora_saved_bytes(work: LocalWork, layer: int) -> float:
    if layer not in work.trainable_layers:
        return 0.0  # frozen adapters keep nothing
    targets: list[LoraTarget] = [t for t in work.lora_targets if t.layer == layer]
    adapter = DTYPE_BYTES[work.adapter_dtype]
    low_rank = sum(adapter * t.rank for t in targets)
    if work.adapter_dtype != work.precision:  # each adapter keeps its own converted copy of its input
        return low_rank + sum(adapter * t.in_features for t in targets)
    inputs = {INPUT_OF[t.module]: t.in_features for t in targets if t.module != "o_proj"}  # attention keeps its output
    return low_rank + adapter * sum(inputs.values())


def weights_bytes(work: LocalWork) -> float:
    """Bytes of the base weights that the client holds.

    Linear weights of the blocks are quantised, nothing else is.
    """
    shape, num_layers = work.shape, len(work.client_layers)
    other = work.compute_bytes if work.weight_dtype in ("int8", "nf4") else DTYPE_BYTES[work.weight_dtype]
    scales = 4 * sum(num_out for _, num_out in shape.linears.values()) if work.weight_dtype == "int8" else 0
    block = shape.linear_params * LINEAR_BYTES[work.weight_dtype] + scales + shape.other_layer_params * other
    tables = 1 if shape.tied_embeddings or work.split is not None else 2
    final_norm = shape.hidden_size if work.split is None else 0
    return num_layers * block + other * (tables * shape.embedding_params + final_norm)


@lru_cache(maxsize=4096)
def memory_need(work: LocalWork) -> MemoryNeed:
    """The coefficients of the peak for one kind of client."""
    shape, c = work.shape, work.compute_bytes
    h, i, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    lowest = work.lowest_trainable(work.client_layers)
    adapter = DTYPE_BYTES[work.adapter_dtype]
    trainable = adapter * work.trainable_elements if work.passes == "train" else 0
    quantised = work.weight_dtype in ("int8", "nf4")
    if lowest is None:
        kept, logits, outputs = 0.0, LOGITS_FORWARD_BYTES[work.precision] * vocab + c * h, 0
        block: float = c * (4 * h + 3 * i)  # measured
        during_product: float = block
        masks = 1
    else:
        saved = [layer_saved_bytes(work, layer) for layer in range(lowest, work.client_layers.stop)]
        saved[0] -= _not_kept(work, lowest)
        masks = 1 if work.checkpointing else len(saved)
        kept = len(saved) * c * h + 4 * h + 12 if work.checkpointing else sum(saved)
        again = max(saved) if work.checkpointing else 0.0
        logits, outputs = LOGITS_TRAIN_BYTES[work.precision] * vocab, c * vocab
        block = max(NORM_BACKWARD_BYTES * h, 3 * c * i) + again  # measured
        during_product = c * (3 * h + i) + again  # measured: around the last dequantised product
    return MemoryNeed(
        weights_bytes=weights_bytes(work),
        adapter_bytes=adapter * work.adapter_elements,
        gradient_bytes=trainable,
        optimizer_bytes=2 * trainable if work.optimizer == "adamw" else 0,
        kept_per_token=kept,
        kept_per_token_pair=c * masks if work.padding_mask else 0,
        logits_per_token=logits if work.split is None else 0,
        outputs_per_token=outputs if work.split is None else 0,
        block_per_token=block,
        dequantised_bytes=c * max(m * n for m, n in shape.linears.values()) if quantised else 0,
        dequantised_per_token=during_product,
    )
