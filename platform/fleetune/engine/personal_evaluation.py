"""The evaluation of clients' own models, each on the examples that its client holds out (``evaluation.personal``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.data.batches import NO_EXAMPLE, num_tokens
from fleetune.engine.execution.executor import Evaluation, Executor, OwnChunk
from fleetune.engine.round.planner import RoundPlanner
from fleetune.methods.base import MAIN, GlobalModel, Method, State
from fleetune.problem import Problem
from fleetune.records.personal_summary import summary
from fleetune.tensors import Tensors
from fleetune.training.evaluate import EvalSums, totals


@dataclass(frozen=True)
class Piece:
    """Some of a client's held-out examples, as many as are evaluated together at most."""

    client_id: int
    model: GlobalModel
    rows: np.ndarray
    """(b,) int: rows of the training examples."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What clients of one chunk have in common: the blocks and frozen tensors that they hold, and their adapters' form."""
        form = tuple((name, tuple(tensor.shape)) for name, tensor in self.model.adapter.items())
        return self.model.model.submodel, id(self.model.model.held), form


class PendingPersonal:
    """The quality of clients' own models, whose evaluation may still be running."""

    def __init__(
        self, problem: Problem, client_ids: np.ndarray, pieces: Sequence[Piece], begun: Evaluation[list[EvalSums]]
    ):
        """``client_ids``: (n,) int, ascending. ``pieces``: in the order of the evaluation's sums."""
        self._problem, self._client_ids, self._pieces, self._begun = problem, client_ids, pieces, begun
        self._columns: dict[str, Any] | None = None

    def is_done(self) -> bool:
        """True if `columns` would not wait."""
        return self._columns is not None or self._begun.is_done()

    def columns(self) -> dict[str, Any]:
        """Columns (n,) of personal.parquet, one entry per client; waits for them."""
        if self._columns is None:
            sums: dict[int, list[EvalSums]] = {client: [] for client in self._client_ids.tolist()}
            found = [one for chunk in self._begun.sums() for one in chunk]
            for piece, one in zip(self._pieces, found, strict=True):
                sums[piece.client_id].append(one)
            quality = [totals(parts) for parts in sums.values()]
            fleet, held_out = self._problem.fleet, self._problem.held_out
            assert held_out is not None
            self._columns = {
                "client_id": self._client_ids,
                "device": np.array(fleet.device_names, dtype=object)[fleet.device_index[self._client_ids]],
                "shard_examples": self._problem.partition.sizes[self._client_ids],
                "held_out_examples": held_out.sizes[self._client_ids],
                "held_out_tokens": np.array(
                    [sum(one.num_tokens for one in parts) for parts in sums.values()], np.int64
                ),
                **{
                    name: np.array([one[name] for one in quality])
                    for name in ("eval_loss", "eval_accuracy")
                    if all(name in one for one in quality)
                },
            }
        return self._columns

    def row(self) -> dict[str, Any]:
        """The columns of rounds.parquet that sum the clients up."""
        columns = self.columns()
        out: dict[str, Any] = {"num_personal": len(self._client_ids)}
        for name, high_is_bad in (("loss", True), ("accuracy", False)):
            if len(self._client_ids) and f"eval_{name}" in columns:
                out.update(summary(f"eval_personal_{name}", columns[f"eval_{name}"], high_is_bad=high_is_bad))
        return out


class PersonalEvaluator:
    """Begins evaluations of clients' own models; nobody waits for them here."""

    def __init__(self, problem: Problem, executor: Executor, planner: RoundPlanner):
        self.problem, self.executor, self.planner = problem, executor, planner

    def check(self) -> None:
        """Raises UserError if the method does not say which model is a client's own; called before any work starts."""
        method = self.problem.method
        if self.problem.spec.evaluation.personal != "none" and type(method).personal is Method.personal:
            start = method.start()
            models = method.evaluated(start, lambda: iter(()))
            method.personal(start, self.planner.info(0), {}, _named(models))

    def is_due(self, *, is_last: bool) -> bool:
        """True if clients are evaluated after a round after which the global model is. ``is_last``: it is the run's last."""
        when = self.problem.spec.evaluation.personal
        return when == "every" or (when == "last" and is_last)

    def evaluate(
        self,
        state: State,
        models: GlobalModel | Mapping[str, GlobalModel],
        busy_until: np.ndarray,
        private: Iterator[tuple[int, int, Tensors]],
    ) -> PendingPersonal:
        """Begin the evaluation of every client that has taken part and holds examples out.

        A client has taken part if it has begun a turn, and so was sent a model: then its last turn ends at some virtual time
        ``busy_until`` (num_clients,) above 0. ``models``: what `Method.evaluated` has returned. ``private``: (client, number of
        examples, tensors) of those that keep some.
        """
        held_out, method = self.problem.held_out, self.problem.method
        assert held_out is not None
        client_ids = np.flatnonzero((busy_until > 0) & (held_out.sizes > 0))
        kept = {client: tensors for client, _, tensors in private}
        named = _named(models)
        pieces = []
        for client in client_ids.tolist():
            model = method.personal(state, self.planner.info(client), kept.get(client, {}), named)
            shard, size = held_out.shard(client), self.problem.spec.evaluation.batch_size
            pieces += [Piece(client, model, shard[start : start + size]) for start in range(0, len(shard), size)]
        chunks = self._chunks(pieces)
        begun = self.executor.evaluate_clients([_chunk(of) for of in chunks])
        return PendingPersonal(self.problem, client_ids, [piece for of in chunks for piece in of], begun)

    def _chunks(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Pieces that are evaluated together: of one kind, and with the filling no more than ``evaluation.batch_size`` examples.

        The cut follows from the job alone, so the sums are the same bits on any number of workers. Pieces of like length stand
        side by side, so that little is filled up.
        """
        kinds: dict[tuple[Any, ...], int] = {}
        numbers = [kinds.setdefault(piece.kind, len(kinds)) for piece in pieces]
        lengths = num_tokens_of_longest(self.problem, pieces)
        order = sorted(range(len(pieces)), key=lambda i: (numbers[i], len(pieces[i].rows), lengths[i], i))
        out: list[list[Piece]] = []
        last = -1
        for i in order:
            piece = pieces[i]
            fits = (
                numbers[i] == last and (len(out[-1]) + 1) * len(piece.rows) <= self.problem.spec.evaluation.batch_size
            )
            if fits:
                out[-1].append(piece)
            else:
                out.append([piece])
            last = numbers[i]
        return out


def num_tokens_of_longest(problem: Problem, pieces: Sequence[Piece]) -> list[int]:
    """Tokens of each piece's longest example."""
    return [int(num_tokens(problem.inputs.train, piece.rows).max()) for piece in pieces]


def _chunk(pieces: Sequence[Piece]) -> OwnChunk:
    """The pieces stacked, rows filled up to the longest, which is the last."""
    width = len(pieces[-1].rows)
    rows = np.full((len(pieces), width), NO_EXAMPLE, np.int64)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece.rows)] = piece.rows
    models = [piece.model for piece in pieces]
    shared = all(model.adapter is models[0].adapter for model in models)
    return OwnChunk(models[:1] if shared else models, rows)


def _named(models: GlobalModel | Mapping[str, GlobalModel]) -> Mapping[str, GlobalModel]:
    return {MAIN: models} if isinstance(models, GlobalModel) else models
