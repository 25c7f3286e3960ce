"""The kinds of adapters, told apart by the names of their tensors, and what the axes of those tensors count.

A name such as ``layers.3.self_attn.q_proj.lora_A`` says where a tensor belongs (block 3, its query projection) and, by its last
part, what it is. A network takes whatever tensors it is given and knows no method:

        at a linear layer        lora_A, lora_B           y + alpha / r · B A x                (Hu et al. 2022)
                                 lora_E beside them       y + alpha / r · B diag(E) A x        (Zhang et al. 2023)
        after a half of a block  bottleneck_down, …_up    y + U act(D y + d) + u               (Houlsby et al. 2019)
                                 generator.…              y + an adapter that a network makes   (`models.generated`)
        at a block's beginning   flow_weight, block_router,
        and at a linear layer    router, mole_gate, …     y + a mixture of a frozen pool of pairs (`models.pools`)

Stacked tensors have the clients in front: ``lora_A`` is (r, in) on its own and (K, r, in) in a cohort of K.

Hu et al. 2022, "LoRA", arXiv 2106.09685. Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751.
Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fleetune.models.generated import GENERATOR_AXES, Generated, Generator
from fleetune.models.pools import POOL, POOL_AXES
from fleetune.tensors import Tensors

RANK = "rank"
"""The axis that counts an adapter's inner width: the ranks of a pair, the units of a bottleneck."""

AXES: dict[str, tuple[str, ...]] = {
    "lora_A": (RANK, "in"),
    "lora_B": ("out", RANK),
    "lora_E": (RANK,),
    "delta": ("out", "in"),
    "merged_A": (RANK, "in"),
    "merged_B": ("out", RANK),
    "bottleneck_down": (RANK, "hidden"),
    "bottleneck_down_bias": (RANK,),
    "bottleneck_up": ("hidden", RANK),
    "bottleneck_up_bias": ("hidden",),
    **GENERATOR_AXES,
    **POOL_AXES,
}
"""Last part of a name -> what each axis of the tensor (without clients) counts. ``in`` and ``out`` are the sizes of the linear
layer, ``hidden`` is the width of the residual stream, ``blocks`` the number of blocks; any other word is a size of its own."""

Axes = Mapping[str, tuple[str, ...]]
BlockAdapter = Callable[[Tensor], Tensor]
"""The output y (K b, S, D) of a half of a block -> what is added to it."""


def axes_of(name: str, axes: Axes = AXES) -> tuple[str, ...] | None:
    """What the axes of a tensor of this name count; None for a name that is not declared."""
    return axes.get(name.rpartition(".")[2])


def rank_axis(name: str, axes: Axes = AXES) -> int | None:
    """The axis of an adapter tensor that counts its ranks, or None if it has none."""
    found = axes_of(name, axes)
    return found.index(RANK) if found is not None and RANK in found else None


def rank_of(tensors: Tensors, axes: Axes = AXES) -> int:
    """The largest rank among the tensors; 0 if no tensor has one."""
    ranks = (tensor.shape[axis] for name, tensor in tensors.items() if (axis := rank_axis(name, axes)) is not None)
    return max(ranks, default=0)


def cut(tensors: Tensors, rank: int, axes: Axes = AXES) -> Tensors:
    """The first ``rank`` ranks of every tensor that has some; other tensors as they are."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        axis = rank_axis(name, axes)
        out[name] = tensor if axis is None else tensor.narrow(axis, 0, min(rank, tensor.shape[axis])).contiguous()
    return out


def is_pair(name: str) -> bool:
    """True for the tensors of a LoRA pair, the only kind that PEFT's format holds; those of a pool do nothing without a gate."""
    return name.endswith((".lora_A", ".lora_B")) and not name.startswith(POOL)


def adds_nothing(adapter: Tensors) -> bool:
    """True if the adapter is made of pairs, with a third factor or without, whose products are all zero: of no pair are both B
    and the third factor E, where there is one, other than zero. The model is then the base model."""

    def is_silent(name: str, tensor: Tensor) -> bool:
        site, _, kind = name.rpartition(".")
        if kind == "lora_B":
            return not (tensor.any() and adapter.get(f"{site}.lora_E", tensor).any())
        return kind in ("lora_A", "lora_E")

    return all(is_silent(name, tensor) for name, tensor in adapter.items())


class Bottleneck:
    """A bottleneck adapter with ReLU after a half of a block, for K clients at once: U relu(D y + d) + u.

    Pfeiffer et al. 2021, "AdapterFusion", arXiv 2005.00247, place one such adapter in a block, after its feed-forward half.
    """

    def __init__(self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor):
        """``down`` (K, w, D), ``down_bias`` (K, w), ``up`` (K, D, w), ``up_bias`` (K, D)."""
        self.down, self.down_bias, self.up, self.up_bias = down, down_bias, up, up_bias

    @classmethod
    def of(cls, stacked: Tensors, half: str) -> Bottleneck | None:
        """The bottleneck of a half such as ``layers.3.mlp``, or None if it has none."""
        down = stacked.get(f"{half}.bottleneck_down")
        if down is None:
            return None
        names = ("bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias")
        return cls(down, *(stacked[f"{half}.{name}"] for name in names))

    def __call__(self, y: Tensor) -> Tensor:
        """y (K b, S, D) -> (K b, S, D)."""
        by_client = y.reshape(len(self.down), -1, y.shape[-1])  # (K, b S, D)
        down, up = self.down.to(y.dtype), self.up.to(y.dtype)
        inner = nn.functional.relu(torch.baddbmm(self.down_bias[:, None].to(y.dtype), by_client, down.mT))
        return torch.baddbmm(self.up_bias[:, None].to(y.dtype), inner, up.mT).view(y.shape)


def block_adapter(stacked: Tensors, block: int, half: str, generator: Generator | None) -> BlockAdapter | None:
    """The adapter after a half (``self_attn`` or ``mlp``) of a block, or None: its own, or what the ``generator`` makes."""
    own = Bottleneck.of(stacked, f"layers.{block}.{half}")
    return Generated(generator, block) if own is None and generator is not None else own
