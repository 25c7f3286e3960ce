"""What one local step costs, as exact functions of its batch: the value that a trace gives, and that prices clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.cost.polynomials import NUM, POINTS, Fitter, evaluate
from fleetune.scopes import CLIENT, SERVER

# The parts of the memory, as `cost.tracer` tells them apart.
PARTS = ("weights", "adapters", "gradients", "optimizer", "saved", "logits", "workspace")


@dataclass(frozen=True)
class SideWork:
    """One step's operators on one side. Polynomials are over `forms.BASIS`."""

    products: np.ndarray
    """(p, 2, 6): FLOPs and bytes of each distinct operator that computes."""
    counts: np.ndarray
    """(p,): how often it runs."""
    names: tuple[str, ...]
    """(p,): torch's name of it."""
    moved: np.ndarray
    """(6,): bytes moved by all the others."""
    num_ops: int
    """Operators that move bytes: kernels to launch."""

    @property
    def flops(self) -> np.ndarray:
        """FLOPs of a step, (6,)."""
        return (self.products[:, 0] * self.counts[:, None]).sum(0)

    @property
    def bytes_moved(self) -> np.ndarray:
        """Bytes of a step, (6,)."""
        return self.moved + (self.products[:, 1] * self.counts[:, None]).sum(0)

    def flops_by_operator(self) -> dict[str, np.ndarray]:
        """{operator: FLOPs (6,)}."""
        out: dict[str, np.ndarray] = {}
        for name, product, count in zip(self.names, self.products, self.counts, strict=True):
            out[name] = out.get(name, np.zeros(NUM)) + product[0] * count
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        arrays = {name: getattr(self, name).tolist() for name in ("products", "counts", "moved")}
        return {**arrays, "names": list(self.names), "num_ops": self.num_ops}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SideWork:
        """The inverse."""
        products = np.array(values["products"], float).reshape(-1, 2, NUM)
        return cls(
            products, np.array(values["counts"], float), tuple(values["names"]), np.array(values["moved"], float),
            int(values["num_ops"]),
        )  # fmt: skip


@dataclass(frozen=True)
class StepTrace:
    """One kind of client's local step, traced from the code that carries it out."""

    client: SideWork
    server: SideWork
    """What the server does for one client (split learning); nothing otherwise."""
    moments: np.ndarray
    """(m, 7, 6): bytes by part at the moments of which one is the peak, whatever the batch."""
    saved: np.ndarray
    """(6,): bytes that autograd keeps of a step for its backward pass, weights and adapters not counted."""
    cut: np.ndarray
    """(2, 6): bytes that a step sends over the cut and receives over it."""

    def peak(self, basis: np.ndarray) -> np.ndarray:
        """Bytes by part at the peak of steps of n batches (n, 6) -> (n, 7)."""
        where = evaluate(self.moments.sum(axis=1), basis).argmax(axis=1)
        at_peak = self.moments[where]
        return sum((at_peak[:, :, k] * basis[:, k, None] for k in range(NUM)), np.zeros(at_peak.shape[:2]))

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        arrays = {name: getattr(self, name).tolist() for name in ("moments", "saved", "cut")}
        return {**arrays, "client": self.client.to_json(), "server": self.server.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepTrace:
        """The inverse."""
        return cls(
            client=SideWork.from_json(values["client"]),
            server=SideWork.from_json(values["server"]),
            moments=np.array(values["moments"], float).reshape(-1, len(PARTS), NUM),
            saved=np.array(values["saved"], float),
            cut=np.array(values["cut"], float).reshape(2, NUM),
        )


class Unequal(Exception):
    """Blocks that were taken to be alike are not."""


@dataclass(frozen=True)
class Recording:
    """A call that was watched at the two points: all of a trace, and every moment of its memory."""

    sides: dict[str, SideWork]
    live: np.ndarray
    """(t, 7, 6): bytes by part on the client after every operator."""
    places: list[tuple[int, int | None]]
    """(t,): step and block of every operator."""
    names: list[str]
    """(t,): operators."""
    saved: np.ndarray
    cut: np.ndarray

    @classmethod
    def of(cls, recordings: Sequence[Any], cuts: Sequence[Sequence[int]]) -> Recording:
        """From two tracers, and the bytes over the cut of one step of each."""
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
            cut=np.stack([fit(*pair) for pair in zip(*cuts, strict=True)]),
        )

    def trace(self) -> StepTrace:
        """What is to be known of a step."""
        return StepTrace(self.sides[CLIENT], self.sides[SERVER], possible_peaks(self.live), self.saved, self.cut)

    def by_slot(self) -> dict[tuple[int, int | None], list[int]]:
        """The operators of every step and block."""
        out: dict[tuple[int, int | None], list[int]] = {}
        for tick, place in enumerate(self.places):
            out.setdefault(place, []).append(tick)
        return out


def at_depth(small: Recording, large: Recording, num_more: int) -> StepTrace:
    """The trace of a model with ``num_more`` blocks more than ``small``; ``large`` has one more. All blocks are alike.

    Every count and size is linear in the depth. So is the memory at every operator, counted from the lowest block or from the
    highest one; in the blocks between, it lies between those two. Raises Unequal where an operator has no counterpart.
    """
    ours, theirs = small.by_slot(), large.by_slot()
    highest = max(block for _, block in ours if block is not None)
    moments = []
    for (step, block), ticks in ours.items():
        from_below = [block] if block is None or block < highest else []
        from_above = [block + 1] if block else []
        for other in (*from_below, *from_above):
            for mine, counterparts in _matched(small, ticks, large, theirs.get((step, other), [])):
                moments.append(small.live[mine] + num_more * (large.live[counterparts] - small.live[mine]))
    return StepTrace(
        client=_linear(small.sides[CLIENT], large.sides[CLIENT], num_more),
        server=_linear(small.sides[SERVER], large.sides[SERVER], num_more),
        moments=possible_peaks(np.concatenate(moments)),
        saved=small.saved + num_more * (large.saved - small.saved),
        cut=small.cut + num_more * (large.cut - small.cut),
    )


def _matched(
    small: Recording, ours: list[int], large: Recording, theirs: list[int]
) -> list[tuple[list[int], list[int]]]:
    """Pairs of equally many operators that correspond to each other; together they hold all of ``ours``.

    Where ``theirs`` are more, something is done tensor by tensor, which a deeper model does more often: what comes before and
    the first of it is counted from the beginning, the last of it and what comes after from the end.
    """
    if len(ours) == len(theirs):
        return [(ours, theirs)]
    if len(ours) > len(theirs):
        raise Unequal
    alike = [small.names[a] == large.names[b] for a, b in zip(ours, theirs, strict=False)]
    first = alike.index(False) if False in alike else len(ours)
    alike = [small.names[a] == large.names[b] for a, b in zip(reversed(ours), reversed(theirs), strict=False)]
    last = alike.index(False) if False in alike else len(ours)
    if first + last < len(ours):
        raise Unequal
    repeated = len(ours) - last  # from here on, what is counted from the end
    return [(ours[:first], theirs[:first]), (ours[repeated:], theirs[-last:] if last else [])]


def _linear(small: SideWork, large: SideWork, num_more: int) -> SideWork:
    """Counts and sums of a deeper model."""

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


def _side_work(first: Any, second: Any, side: str, fit: Fitter) -> SideWork:
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
    """Bytes by part that the sides hold together after every operator, (t, len(parts), 6)."""
    fit = Fitter(POINTS)
    change = np.zeros((first.clock + 1, len(parts), NUM))
    for a, b in zip(first.held, second.held, strict=True):
        since = [a.since[side] for side in sides if side in a.since]
        if not since or a.part not in parts:
            continue
        size = fit(a.num_bytes, b.num_bytes)
        change[min(since), parts.index(a.part)] += size
        if a.until is not None:
            change[max(a.until, min(since)), parts.index(a.part)] -= size
    return change[: first.clock].cumsum(axis=0)


def possible_peaks(live: np.ndarray) -> np.ndarray:
    """The moments that no other exceeds in every coefficient: one of them is the peak, whatever the batch."""
    totals = live.sum(axis=1)
    order = np.lexsort(totals.T)[::-1]
    kept: list[int] = []
    for index in order[np.argsort(-totals[order].sum(axis=1), kind="stable")]:
        if not any((totals[other] >= totals[index]).all() for other in kept):
            kept.append(int(index))
    return live[sorted(kept)]
