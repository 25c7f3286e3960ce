"""Who is refused, what it does instead where clients adapt, and what else would have fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fleetune.engine.round.work import Work
from fleetune.engine.round.workload import (
    BATCH,
    CAPACITY,
    CHECKPOINTING,
    RANK,
    Share,
    shrunk_payload,
    shrunk_rows,
)
from fleetune.methods.base import Method
from fleetune.problem.input_checks import can_shrink

Costs = dict[str, np.ndarray]
Price = Callable[[Work, np.ndarray], Costs]
"""What a work costs these clients, columns (n,)."""
Broken = Callable[[np.ndarray, Costs], np.ndarray]
"""The budget that each of these clients would break at these costs, or None, objects (n,)."""


@dataclass(frozen=True)
class BudgetFit:
    """The work as it will be carried out, what it costs, and who will not carry it out."""

    work: Work
    costs: Costs
    refused_by: np.ndarray
    """The budget that a client would break whatever it shrinks, or None, objects (n,)."""
    hints: np.ndarray
    """For those: what would fit, in words; else None, objects (n,)."""


class BudgetFitting:
    """Fits a round's work to its clients' budgets. ``adapt``: what clients make smaller by themselves; ``hints``: whether it
    says of the others what would fit them."""

    def __init__(self, method: Method, adapt: str, *, price: Price, broken: Broken, hints: bool):
        self.method, self.adapt, self.price, self.broken, self.hints = method, adapt, price, broken, hints

    def fit(self, work: Work, client_ids: np.ndarray) -> BudgetFit:
        """Price the whole work, shrink it where a budget breaks and clients adapt, and say of the rest what would fit."""
        costs = self.price(work, client_ids)
        refused_by = self.broken(client_ids, costs)
        if self.adapt != "none":
            work, costs, refused_by = self._adapted(work, client_ids, costs, refused_by)
        return BudgetFit(work, costs, refused_by, self._hints(work, client_ids, refused_by))

    def _adapted(
        self, work: Work, client_ids: np.ndarray, costs: Costs, refused_by: np.ndarray
    ) -> tuple[Work, Costs, np.ndarray]:
        payloads, shares = list(work.payloads), list(work.shares)
        groups, source = list(work.groups), list(work.source)
        group_of, rows, checkpointing = work.group_of.copy(), list(work.rows), work.checkpointing.copy()
        for key in range(len(work.payloads)):
            for where, part, tried in self._descent(work, key, client_ids, refused_by, self.adapt):
                for name, column in costs.items():
                    column[where] = tried[name]
                refused_by[where] = None
                checkpointing[where] = part.checkpointing
                if self.adapt == CHECKPOINTING:
                    continue  # the same work in another order: its clients go on training with the others
                group_of[where] = len(payloads)
                payloads += part.payloads
                shares += part.shares
                groups += part.groups
                source.append(key)
                for i, mine in zip(where.tolist() if rows else [], part.rows, strict=True):
                    rows[i] = mine
        adapted = replace(
            work,
            payloads=payloads,
            shares=shares,
            groups=groups,
            source=source,
            group_of=group_of,
            rows=rows,
            checkpointing=checkpointing,
        )
        return adapted, costs, refused_by

    def _descent(
        self, work: Work, key: int, client_ids: np.ndarray, refused_by: np.ndarray, kind: str
    ) -> list[tuple[np.ndarray, Work, Costs]]:
        """Down the ladder: (clients whom a share fits as the first, their part of the work, its costs) of every step."""
        whole = work.shares[key]
        ladder = list(whole.ladder(kind))
        pending = np.flatnonzero((work.group_of == key) & (refused_by != None))  # noqa: E711
        if not ladder or not len(pending):
            return []
        smallest = self._tried(work, key, client_ids, pending, ladder[-1])
        pending = pending[smallest[1]]  # whom not even the last step fits, no step does
        out = []
        for share in ladder:
            if not len(pending):
                break
            part, fits, costs = self._tried(work, key, client_ids, pending, share)
            if fits.any():
                where = pending[fits]
                out.append((where, part.at(fits), {name: column[fits] for name, column in costs.items()}))
                pending = pending[~fits]
        return out

    def _tried(
        self, work: Work, key: int, client_ids: np.ndarray, where: np.ndarray, share: Share
    ) -> tuple[Work, np.ndarray, Costs]:
        """Some clients' work with a smaller share, whom it fits, and what it costs."""
        payload = shrunk_payload(self.method, work.payloads[key], share, work.shares[key])
        part = work.at(where)
        part = replace(
            part,
            payloads=[payload],
            shares=[share],
            groups=[work.groups[key]],
            source=[0],
            group_of=np.zeros(len(where), np.int64),
            rows=shrunk_rows(part.rows, share),
            checkpointing=np.full(len(where), share.checkpointing),
        )
        costs = self.price(part, client_ids[where])
        refused_by = self.broken(client_ids[where], costs)
        return part, refused_by == None, costs  # noqa: E711

    def _hints(self, work: Work, client_ids: np.ndarray, refused_by: np.ndarray) -> np.ndarray:
        """For each refused client the ways that would fit: one thing made smaller, or batch and checkpointing together."""
        out = np.full(len(refused_by), None, dtype=object)
        refused = np.flatnonzero(refused_by != None)  # noqa: E711
        if not len(refused) or not self.hints:
            return out
        told: dict[int, list[str]] = {i: [] for i in refused.tolist()}
        for key in np.unique(work.group_of[refused]).tolist():
            whole = work.shares[key]
            for kind in (BATCH, CHECKPOINTING, CAPACITY, RANK):
                if kind == CAPACITY and not can_shrink(type(self.method)):
                    continue
                for where, part, _ in self._descent(work, key, client_ids, refused_by, kind):
                    way = part.shares[0].told(whole)
                    for i in where.tolist():
                        told[i].append(way)
            mine = refused[work.group_of[refused] == key]
            none = np.array([i for i in mine.tolist() if not told[i]], np.int64)
            if len(none):
                least = replace(whole, batch_size=1, checkpointing=True)
                _, fits, _ = self._tried(work, key, client_ids, none, least)
                for i in none[fits].tolist():
                    told[i].append(least.told(whole))
        out[refused] = [" or ".join(ways) or "nothing smaller" for ways in told.values()]
        return out
