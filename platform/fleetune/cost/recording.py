"""From two recordings of a step, at two batches, to its trace: exact functions of the batch, and of the model's depth.

Legend: t operators were recorded, memory has 7 parts (`cost.trace.PARTS`), polynomials have NUM coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.cost.polynomials import NUM, POINTS, Fitter
from fleetune.cost.trace import PARTS, SideWork, StepTrace
from fleetune.scopes import CLIENT, SERVER


class Unequal(Exception):
    """Blocks that were taken to cost the same do not."""


@dataclass(frozen=True)
class Recording:
    """A call that was recorded at both `POINTS`: a trace with every moment of its memory, not only the possible peaks."""

    sides: dict[str, SideWork]  # by `scopes.CLIENT` and `scopes.SERVER`
    live: np.ndarray  # (t, 7, NUM): bytes by part that the client holds after every operator
    places: list[tuple[int, int | None]]  # (t,): step and block of every operator; None outside the blocks
    names: list[str]  # (t,): torch's names of the operators
    saved: np.ndarray  # (NUM,), as in StepTrace
    cut: np.ndarray  # (2, NUM), as in StepTrace
    upload: np.ndarray  # (2,), as in StepTrace

    @classmethod
    def of(
        cls, recordings: Sequence[Any], cuts: Sequence[Sequence[Sequence[int]]], uploads: Sequence[Sequence[int]]
    ) -> Recording:
        """From the tracers of both points, the bytes of a step at the cut (sent and received, path by path), and those of the
        upload (of any number of steps, of each step).

        Raises ValueError if the work runs other operators, or holds other tensors, for another batch: the n-th of one recording
        is then not the n-th of the other, and no polynomial goes through the two. An upload may not depend on the batch either.
        """
        if uploads[0] != uploads[1]:
            raise ValueError(f"the upload's size depends on the batch: {uploads}")
        first, second = recordings
        fit = Fitter(POINTS)
        if [op.name for op in first.ops] != [op.name for op in second.ops] or len(first.held) != len(second.held):
            raise ValueError("the work runs other operators for another batch: it cannot be traced")
        return cls(
            sides={side: _side_work(first, second, side, fit) for side in (CLIENT, SERVER)},
            live=live_bytes(first, second, (CLIENT,)),
            places=first.places,
            names=[op.name for op in first.ops],
            saved=sum((fit(*pair) for pair in zip(first.saved_bytes, second.saved_bytes, strict=True)), np.zeros(NUM)),
            cut=sum((_cut(a, b, fit) for a, b in zip(cuts[0], cuts[1], strict=True)), np.zeros((2, NUM))),
            upload=np.array(uploads[0], float),
        )

    def trace(self) -> StepTrace:
        """The trace of the step that was recorded."""
        moments = possible_peaks(self.live)
        return StepTrace(self.sides[CLIENT], self.sides[SERVER], moments, self.saved, self.cut, self.upload)

    def by_slot(self) -> dict[tuple[int, int | None], list[int]]:
        """{(step, block): the positions of its operators}."""
        out: dict[tuple[int, int | None], list[int]] = {}
        for tick, place in enumerate(self.places):
            out.setdefault(place, []).append(tick)
        return out


def at_depth(small: Recording, large: Recording, num_more: int) -> StepTrace:
    """The trace of a model with ``num_more`` blocks more than ``small``; ``large`` has one more. All blocks cost the same.

    Every count and size is linear in the depth, so that ``small + num_more (large - small)`` is exact. So is the memory at an
    operator of one block, if that block is counted from the bottom in all models, or from the top. Of three blocks, the middle
    one therefore stands for two of the deep model: for the second from the bottom and for the second from the top. The blocks
    between these need no more than one of the two, so that no peak is missed. Raises Unequal if an operator has no counterpart:
    some block is then treated as no other, and the model must be traced in full.
    """
    of_small, of_large = small.by_slot(), large.by_slot()
    highest = max((block for _, block in of_small if block is not None), default=0)
    moments = []
    for (step, block), ticks in of_small.items():
        # The lowest block has a counterpart from below alone, the highest from above alone: neither stands at the other end.
        from_below = [block] if block is None or block < highest else []
        from_above = [block + 1] if block else []
        for other in (*from_below, *from_above):
            for few, many in _matched(small, ticks, large, of_large.get((step, other), [])):
                moments.append(small.live[few] + num_more * (large.live[many] - small.live[few]))
    return StepTrace(
        client=_linear(small.sides[CLIENT], large.sides[CLIENT], num_more),
        server=_linear(small.sides[SERVER], large.sides[SERVER], num_more),
        moments=possible_peaks(np.concatenate(moments)),
        saved=small.saved + num_more * (large.saved - small.saved),
        cut=small.cut + num_more * (large.cut - small.cut),
        upload=small.upload + num_more * (large.upload - small.upload),
    )


def _matched(small: Recording, few: list[int], large: Recording, many: list[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of equally long lists of operators that correspond to each other; together the pairs hold all of ``few``.

    ``many`` are more if something outside the blocks is done tensor by tensor, and so more often in a deeper model. Then the
    operators before the repetition, and its first turn, are matched from the beginning; its last turn, and what comes after,
    from the end. Raises Unequal if the two matches leave a gap.
    """
    if len(few) == len(many):
        return [(few, many)]
    if len(few) > len(many):
        raise Unequal
    first = _num_equal([small.names[a] == large.names[b] for a, b in zip(few, many, strict=False)])
    last = _num_equal([small.names[a] == large.names[b] for a, b in zip(reversed(few), reversed(many), strict=False)])
    if first + last < len(few):
        raise Unequal
    repeated = len(few) - last  # from here on, operators are matched from the end
    return [(few[:first], many[:first]), (few[repeated:], many[-last:] if last else [])]


def _num_equal(is_equal: list[bool]) -> int:
    """How many there are before the first False."""
    return is_equal.index(False) if False in is_equal else len(is_equal)


def _linear(small: SideWork, large: SideWork, num_more: int) -> SideWork:
    """The operators of a model with ``num_more`` blocks more than ``small``, in the order of ``large``.

    An operator is known by its name and its polynomials: a block more runs the same ones more often. Raises Unequal if
    ``large`` lacks one of ``small``'s.
    """

    def counted(work: SideWork) -> dict[tuple, float]:
        keys = ((name, product.tobytes()) for name, product in zip(work.names, work.products, strict=True))
        return dict(zip(keys, work.counts.tolist(), strict=True))

    few, many = counted(small), counted(large)
    keys = list(many)
    counts = [few.get(key, 0.0) + num_more * (many[key] - few.get(key, 0.0)) for key in keys]
    if any(key not in many for key in few):
        raise Unequal
    return SideWork(
        products=np.array([np.frombuffer(product) for _, product in keys]).reshape(-1, 2, NUM),
        counts=np.array(counts),
        names=tuple(name for name, _ in keys),
        moved=small.moved + num_more * (large.moved - small.moved),
        num_ops=small.num_ops + num_more * (large.num_ops - small.num_ops),
    )


def _cut(first: Sequence[int], second: Sequence[int], fit: Fitter) -> np.ndarray:
    """The polynomials of one path's bytes at the cut (sent, received), (2, NUM), from both points."""
    return np.stack([fit(*pair) for pair in zip(first, second, strict=True)])


def _side_work(first: Any, second: Any, side: str, fit: Fitter) -> SideWork:
    """The operators of one step on one side, from the tracers of both points.

    Two steps are recorded and the first is counted. The second is there for its memory: it finds the optimizer's state.
    """
    products: dict[tuple, int] = {}
    moved, num_ops = np.zeros(NUM), 0
    only = 0 if first.step >= 0 else -1  # a method without batches has no steps: its whole call counts
    for a, b in zip(first.ops, second.ops, strict=True):
        if a.side != side or a.step != only:
            continue
        num_ops += 1
        traffic = sum((fit(*pair) for pair in zip(a.bytes, b.bytes, strict=True)), np.zeros(NUM))
        if a.flops:
            key = (a.name, tuple(fit(a.flops, b.flops)), tuple(traffic))
            products[key] = products.get(key, 0) + 1
        else:
            moved += traffic
    return SideWork(
        products=np.array([key[1:] for key in products], float).reshape(-1, 2, NUM),
        counts=np.array(list(products.values()), float),
        names=tuple(key[0] for key in products),
        moved=moved,
        num_ops=num_ops,
    )


def live_bytes(first: Any, second: Any, sides: Sequence[str], parts: Sequence[str] = PARTS) -> np.ndarray:
    """Bytes by part that the sides hold together after every operator, (t, len(parts), NUM).

    Each piece of memory is added at the operator that made it and taken away at the first that runs without it; the running sum
    is what is held. A piece that several sides hold counts once, from the earliest on.
    """
    fit = Fitter(POINTS)
    change = np.zeros((first.clock + 1, len(parts), NUM))
    for a, b in zip(first.held, second.held, strict=True):
        since = [a.since[side] for side in sides if side in a.since]  # empty if none of them ever read it
        if not since or a.part not in parts:
            continue
        size = fit(a.num_bytes, b.num_bytes)
        change[min(since), parts.index(a.part)] += size
        if a.until is not None:
            change[max(a.until, min(since)), parts.index(a.part)] -= size
    return change[: first.clock].cumsum(axis=0)


def possible_peaks(live: np.ndarray) -> np.ndarray:
    """The moments of ``live (t, 7, NUM)`` that no other exceeds in every coefficient, (m, 7, NUM).

    One of them is the peak, whatever the batch: no monomial of a batch is negative, so that a moment that another exceeds in
    every coefficient never needs more. That leaves a handful of some thousand moments to evaluate.
    """
    totals = live.sum(axis=1)  # (t, NUM)
    order = np.lexsort(totals.T)[::-1]
    # Largest sums first: a moment can only be exceeded by one that comes before it.
    left = order[np.argsort(-totals[order].sum(axis=1), kind="stable")]
    peaks: list[int] = []
    while len(left):
        peaks.append(int(left[0]))
        left = left[(totals[left] > totals[left[0]]).any(axis=1)]
    return live[sorted(peaks)]
