"""The cost of one operator of torch: its FLOPs by formula, its bytes by the tensors that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Operators that give memory or another view of it: nothing is read or written, and no kernel is launched.
NO_TRAFFIC = {"_unsafe_view", "detach", "alias", "_reshape_alias", "lift_fresh", "empty", "empty_like", "new_empty"}
NO_TRAFFIC |= {"empty_strided", "new_empty_strided"}
GATHERS = {"embedding", "index_select", "index"}  # read only the rows that they give
OVERWRITES = {"copy_", "fill_", "zero_"}  # do not read what they replace


@cache
def moves_nothing(func: Any) -> bool:
    """True if the operator is a view or an allocation."""
    return func.is_view or func._overloadpacket.__name__ in NO_TRAFFIC


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """(B, heads, S, d) by the kernel that the CPU takes; if heads share keys and values, the kernel tells by the sizes."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def signature(func: Any, args: tuple, kwargs: dict) -> tuple | None:
    """A key of all that decides an operator's result: its arguments, tensors by shape. None if one cannot be hashed."""
    if "out" in kwargs:
        return None
    parts = tuple(_described(value) for value in (*args, *kwargs.values()))
    try:
        hash(parts)
    except TypeError:
        return None
    return func, parts, tuple(kwargs)


def _described(value: Any) -> Any:
    """An argument as a part of a key."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_described(part) for part in value)
    return type(value), value  # 1, 1.0 and True are equal, and give results of other types


def as_fake(values: Any) -> Any:
    """Arguments with fake tensors, of the same shapes, in place of the real ones."""
    if isinstance(values, Tensor) and values.is_meta:
        return values
    if isinstance(values, Tensor):
        return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
    if isinstance(values, (tuple, list)):
        return type(values)(as_fake(value) for value in values)
    return {name: as_fake(value) for name, value in values.items()} if isinstance(values, dict) else values


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)


def _size(tensor: Tensor) -> int:
    """Bytes to move a tensor: a view that repeats elements has no more than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def traffic(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, ...]:
    """Bytes that an operator moves, tensor by tensor: it reads each distinct input once, and writes each output once."""
    if name in GATHERS:
        return tuple(2 * _size(t) for t in outputs)
    if name in OVERWRITES:
        inputs = inputs[1:]
    distinct = {id(t): t for t in inputs}
    return tuple(_size(t) for t in (*distinct.values(), *outputs))


def flop_formulas() -> dict[Any, Callable]:
    """{operator: a function of its arguments that gives its FLOPs}: torch's own, and the same for the CPU's attention."""
    from torch.utils import flop_counter
    from torch.utils._pytree import tree_map

    def of_shapes(formula: Callable) -> Callable:
        def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            args, kwargs = tree_map(flop_counter.get_shape, (args, kwargs))
            return formula(*args, **kwargs)

        return counted

    aten = torch.ops.aten
    return {
        **flop_counter.flop_registry,
        # Bags of rows (T q rows of D numbers, by a flat index): a product and a sum for each number, as in `models.routed`.
        aten._embedding_bag: of_shapes(lambda rows, index, *_, **__: 2 * index.numel() * rows[1]),
        aten._embedding_bag_per_sample_weights_backward: of_shapes(
            lambda grad, rows, index, *_, **__: 2 * index.numel() * rows[1]
        ),
        aten._scaled_dot_product_flash_attention_for_cpu: of_shapes(
            lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: of_shapes(
            lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
