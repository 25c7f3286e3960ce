"""FLOPs of one local step, in closed form: 2 FLOPs per multiply-add, exact against torch's FlopCounterMode.

A linear layer costs 2·in·out per token forward; backward through frozen weights costs the same once more (dX
only). A LoRA pair costs 2·r·(in + out) forward, and twice that backward where it trains (dX and dW), once
where it is frozen. Attention costs 4·a·d·S per token forward (scores and values, no causal saving), and 2.5
times that backward: flash attention computes the scores again. At the lowest trainable block nothing below
its first adapter needs a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from fleetune.cost.work import LocalWork, LoraTarget

FLASH_BACKWARD = 2.5  # dV, dP, dQ, dK and the recomputed scores: five products against two forward
# The order in which a block uses its linears: what lies before the first adapter needs no gradient.
STAGE = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


@dataclass(frozen=True)
class StepFlops:
    """Coefficients of one step: ``b·S·(per_token + per_token_pair·S + per_logit·logit_fraction)`` FLOPs."""

    per_token: float
    per_token_pair: float  # attention
    per_logit: float  # the head, on the positions where logits are computed

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(
            self.per_token + other.per_token,
            self.per_token_pair + other.per_token_pair,
            self.per_logit + other.per_logit,
        )

    def scaled(self, factor: float) -> StepFlops:
        """The same work ``factor`` times."""
        return StepFlops(self.per_token * factor, self.per_token_pair * factor, self.per_logit * factor)


def _lora_flops(targets: Iterable[LoraTarget]) -> float:
    return sum(2.0 * t.rank * (t.in_features + t.out_features) for t in targets)


def forward_flops(work: LocalWork, layers: range, *, head: bool) -> StepFlops:
    """One forward pass through the blocks at ``layers``, and the head."""
    shape = work.shape
    adapters = _lora_flops(t for t in work.lora_targets if t.layer in layers)
    return StepFlops(
        len(layers) * 2.0 * shape.linear_params + adapters,
        len(layers) * 4.0 * shape.num_heads * shape.head_dim,
        2.0 * shape.embedding_params if head else 0.0,
    )


def _not_differentiated(work: LocalWork, layer: int) -> StepFlops:
    """What backward leaves out in the lowest trainable block: all that lies before its first adapter."""
    shape = work.shape
    adapted = [t for t in work.lora_targets if t.layer == layer]
    if not adapted or work.checkpointing:  # checkpointing asks for the gradient of the block's input (HF and PEFT)
        return StepFlops(0.0, 0.0, 0.0)
    first = min(STAGE[t.module] for t in adapted)
    linear = sum(2.0 * m * n for name, (m, n) in shape.linears.items() if STAGE[name] <= first)
    inputs = sum(2.0 * t.rank * t.in_features for t in adapted if STAGE[t.module] <= first)
    attention = 0.0 if first == 0 else FLASH_BACKWARD * 4.0 * shape.num_heads * shape.head_dim
    return StepFlops(linear + inputs, attention, 0.0)


def backward_flops(work: LocalWork, layers: range, *, head: bool, to_bottom: bool = False) -> StepFlops:
    """Backward through ``layers``, down to the lowest trainable one or (``to_bottom``) through them all."""
    lowest = layers.start if to_bottom else work.lowest_trainable(layers)
    if lowest is None:
        return StepFlops(0.0, 0.0, 0.0)
    differentiated = range(lowest, layers.stop)
    once = forward_flops(work, differentiated, head=head)
    weight_gradients = _lora_flops(
        t for t in work.lora_targets if t.layer in differentiated and t.layer in work.trainable_layers
    )
    total = StepFlops(once.per_token + weight_gradients, FLASH_BACKWARD * once.per_token_pair, once.per_logit)
    if not to_bottom:
        total += _not_differentiated(work, lowest).scaled(-1)
    return total + _recomputed(work, differentiated) if work.checkpointing else total


def _recomputed(work: LocalWork, layers: range) -> StepFlops:
    """Checkpointed blocks run again, up to their last saved tensor: a bare last linear is not repeated."""
    num_in, num_out = work.shape.linears["down_proj"]
    adapted = {t.layer for t in work.lora_targets if t.module == "down_proj"}
    spared = 2.0 * num_in * num_out * sum(layer not in adapted for layer in layers)
    return forward_flops(work, layers, head=False) + StepFlops(-spared, 0.0, 0.0)


@lru_cache(maxsize=4096)
def client_flops(work: LocalWork) -> StepFlops:
    """FLOPs of one step on the client."""
    head = work.split is None
    forward = forward_flops(work, work.client_layers, head=head)
    return forward.scaled(work.forwards_per_step) + backward_flops(work, work.client_layers, head=head)


@lru_cache(maxsize=4096)
def server_flops(work: LocalWork) -> StepFlops:
    """FLOPs of one step that the server does for a client of split learning; zero without a split."""
    if work.split is None:
        return StepFlops(0.0, 0.0, 0.0)
    forward = forward_flops(work, work.server_layers, head=True)
    to_bottom = work.lowest_trainable(work.client_layers) is not None
    backward = backward_flops(work, work.server_layers, head=True, to_bottom=to_bottom)
    return forward.scaled(work.forwards_per_step) + backward
