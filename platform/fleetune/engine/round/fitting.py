"""A round's work held against its clients' budgets: who is refused, who does less instead, and what would have fitted.

Every question goes to `Price`, which may trace a new payload. So clients of one payload are tried together, and each step of
the ladder is priced only for those that no earlier step has fitted.
"""

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
    Workload,
    shrunk_payload,
    shrunk_rows,
)
from fleetune.methods.base import Method
from fleetune.problem.input_checks import can_shrink

Costs = dict[str, np.ndarray]
"""Columns (n,), one entry per client: what its whole turn costs it, units as in the columns' names."""
Price = Callable[[Work, np.ndarray], Costs]
"""(the work of n clients, their ids (n,)) -> what it costs them. The columns are new with every call."""
BrokenBudget = Callable[[np.ndarray, Costs], np.ndarray]
"""(client ids (n,), their costs) -> (n,) objects: the name of the budget that each would break at these costs, or None."""


@dataclass(frozen=True)
class BudgetFit:
    """The work of n clients as it will be carried out, what it costs, and who will not carry it out."""

    work: Work
    """Clients that have adapted receive smaller payloads here. Refused ones still have their full work: it is what they were
    offered, and what their costs are those of."""
    costs: Costs
    refused_by: np.ndarray
    """(n,) objects: the budget that a client would break whatever it shrinks, or None."""
    hints: np.ndarray
    """(n,) objects: for refused clients what would fit, in words; None for the others, and if no hints were wanted."""


class BudgetFitting:
    """Fits a round's work to its clients' budgets.

    ``adapt``: what clients make smaller by themselves, the job's ``fleet.adapt``. ``hints``: True if refused clients are to
    hear what would fit them, which takes up to four more ladders of prices.
    """

    def __init__(self, method: Method, adapt: str, *, price: Price, broken: BrokenBudget, hints: bool):
        self.method, self.adapt, self.price, self.broken, self.hints = method, adapt, price, broken, hints

    def fit(self, work: Work, client_ids: np.ndarray) -> BudgetFit:
        """Price the full work, shrink it for clients that adapt and would break a budget, and find hints for the rest."""
        costs = self.price(work, client_ids)
        refused_by = self.broken(client_ids, costs)
        if self.adapt != "none":
            work, costs, refused_by = self._adapted(work, client_ids, costs, refused_by)
        return BudgetFit(work, costs, refused_by, self._hints(work, client_ids, refused_by))

    def _adapted(
        self, work: Work, client_ids: np.ndarray, costs: Costs, refused_by: np.ndarray
    ) -> tuple[Work, Costs, np.ndarray]:
        """The work, costs and refusals (n,) after every refused client has taken the largest workload that fits it.

        Payloads are only ever added behind the given ones, so that the indices of the clients that stay as they are, and
        those in `Work.source`, remain right. ``costs`` and ``refused_by`` are this call's own and are written into.
        """
        payloads, workloads = list(work.payloads), list(work.workloads)
        groups, source = list(work.groups), list(work.source)
        payload_of, rows, checkpointing = work.payload_of.copy(), list(work.rows), work.checkpointing.copy()
        for key in range(len(work.payloads)):
            for index, part, part_costs in self._descent(work, key, client_ids, refused_by, self.adapt):
                for name, column in costs.items():
                    column[index] = part_costs[name]
                refused_by[index] = None
                checkpointing[index] = part.checkpointing
                if self.adapt == CHECKPOINTING:
                    continue  # the payload is the same, so a new one would only part these clients from their cohort
                payload_of[index] = len(payloads)
                payloads += part.payloads
                workloads += part.workloads
                groups += part.groups
                source.append(key)
                for i, batches in zip(index.tolist() if rows else [], part.rows, strict=True):
                    rows[i] = batches
        adapted = replace(
            work,
            payloads=payloads,
            workloads=workloads,
            groups=groups,
            source=source,
            payload_of=payload_of,
            rows=rows,
            checkpointing=checkpointing,
        )
        return adapted, costs, refused_by

    def _descent(
        self, work: Work, key: int, client_ids: np.ndarray, refused_by: np.ndarray, kind: str
    ) -> list[tuple[np.ndarray, Work, Costs]]:
        """Try ever smaller workloads of a kind on the refused clients of payload ``key``.

        For each workload that is the first to fit some of them: the indices of these clients, their work and its costs.
        """
        ladder = list(work.workloads[key].ladder(kind))
        pending = np.flatnonzero((work.payload_of == key) & _is_refused(refused_by))
        if not ladder or not len(pending):
            return []
        # No cost grows from one step of a ladder to the next, so a client that the last step does not fit fits nowhere. Asking
        # this first spares such clients, often all of a device class, the steps between.
        _, fits, _ = self._tried(work, key, client_ids, pending, ladder[-1])
        pending = pending[fits]
        found = []
        for workload in ladder:
            if not len(pending):
                break
            part, fits, costs = self._tried(work, key, client_ids, pending, workload)
            if fits.any():
                found.append((pending[fits], part.at(fits), {name: column[fits] for name, column in costs.items()}))
                pending = pending[~fits]
        return found

    def _tried(
        self, work: Work, key: int, client_ids: np.ndarray, index: np.ndarray, workload: Workload
    ) -> tuple[Work, np.ndarray, Costs]:
        """The work of k clients of payload ``key``, at the indices ``index`` (k,), with a smaller workload.

        Returns that work, with its one payload at index 0; whom it fits, (k,) bool; and its costs, columns (k,).
        """
        payload = shrunk_payload(self.method, work.payloads[key], workload, work.workloads[key])
        part = work.at(index)
        part = replace(
            part,
            payloads=[payload],
            workloads=[workload],
            groups=[work.groups[key]],
            source=[0],
            payload_of=np.zeros(len(index), np.int64),
            rows=shrunk_rows(part.rows, workload),
            checkpointing=np.full(len(index), workload.checkpointing),
        )
        costs = self.price(part, client_ids[index])
        return part, ~_is_refused(self.broken(client_ids[index], costs)), costs

    def _hints(self, work: Work, client_ids: np.ndarray, refused_by: np.ndarray) -> np.ndarray:
        """For each refused client the ways that would fit, (n,) objects: one thing made smaller, or batch and checkpointing.

        A client that is still refused has not adapted. So its payload is a full one, also after `_adapted` has added others.
        """
        hints = np.full(len(refused_by), None, dtype=object)
        refused = np.flatnonzero(_is_refused(refused_by))
        if not len(refused) or not self.hints:
            return hints
        ways: dict[int, list[str]] = {i: [] for i in refused.tolist()}
        for key in np.unique(work.payload_of[refused]).tolist():
            full = work.workloads[key]
            for kind in (BATCH, CHECKPOINTING, CAPACITY, RANK):
                if kind == CAPACITY and not can_shrink(type(self.method)):
                    continue
                for index, part, _ in self._descent(work, key, client_ids, refused_by, kind):
                    way = part.workloads[0].reduction(full)
                    for i in index.tolist():
                        ways[i].append(way)
            members = refused[work.payload_of[refused] == key]
            without = np.array([i for i in members.tolist() if not ways[i]], np.int64)
            if len(without):
                least = replace(full, batch_size=1, checkpointing=True)
                _, fits, _ = self._tried(work, key, client_ids, without, least)
                for i in without[fits].tolist():
                    ways[i].append(least.reduction(full))
        # The dictionary was filled in the order of ``refused``, and keeps it.
        hints[refused] = [" or ".join(found) or "nothing smaller" for found in ways.values()]
        return hints


def _is_refused(refused_by: np.ndarray) -> np.ndarray:
    """True for each client that would break a budget, (n,) bool."""
    return refused_by != None  # noqa: E711  (elementwise on objects; "is not" would ask about the array itself)
