"""Rounds that are done and wait to be written: a round goes on record once its evaluation is there, maybe a round later.

A round's records are written first and the state that a killed run goes on from last, rounds in their order. While a round
waits, the next one is already being worked on; a kill then costs both, and both are done again with the same bits. The
state is written, and all of the round made to last, beside the next round's work too: fsyncs take one or two hundredths of a
second, as long as a round of a hundred idle clients. A round waits for those of the one before it, never for its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fleetune import files
from fleetune.engine.checkpoint.checkpoint import Checkpoint, Progress, Snapshot
from fleetune.engine.execution.executor import Evaluation
from fleetune.engine.personal_evaluation import PendingPersonal
from fleetune.methods.base import MAIN
from fleetune.records.run_directory import RunDirectory
from fleetune.training.evaluate import EvalSums, totals

Quality = dict[str, float]

# Rounds that may wait for their evaluation while a further one is worked on. An evaluation fills the time that workers are idle
# within a round. If it takes longer than that, more waiting rounds would not help: the evaluations would only pile up.
MAX_OPEN = 1


class PendingQuality:
    """Loss and accuracy whose evaluation may still be running: of one model, whose name is "", or of several by name."""

    def __init__(self, evaluations: Mapping[str, Evaluation[EvalSums]]):
        self._evaluations = evaluations
        self._quality: Quality | None = None

    def is_done(self) -> bool:
        """True if `quality` would not wait."""
        return self._quality is not None or all(one.is_done() for one in self._evaluations.values())

    def quality(self) -> Quality:
        """Loss and accuracy; waits for them.

        Of several models each has columns of its own, ``eval_loss/<name>``; the run's are those of `MAIN`, or else their mean.
        """
        if self._quality is None:
            # Names may share an evaluation, and a second call of `sums` would find nothing.
            distinct = {id(one): one for one in self._evaluations.values()}
            found = {key: totals(one.sums()) for key, one in distinct.items()}
            by_name = {name: found[id(one)] for name, one in self._evaluations.items()}
            self._quality = by_name[""] if list(by_name) == [""] else _joined(by_name)
        return self._quality


def _joined(by_name: dict[str, Quality]) -> Quality:
    """The columns of several named models."""
    kinds = next(iter(by_name.values()))
    mean = {kind: sum(one[kind] for one in by_name.values()) / len(by_name) for kind in kinds}
    named = {f"{kind}/{name}": one[kind] for name, one in by_name.items() if name != MAIN for kind in kinds}
    return {**by_name.get(MAIN, mean), **named}


@dataclass
class FinishedRound:
    """A round whose work is done: its row, its clients' columns, the run as it stands after it, and its evaluation."""

    row: dict[str, Any]
    """The round's row of rounds.parquet, still without its evaluation, which `PendingRounds.write` adds."""
    clients: dict[str, Any]
    """Columns (n,) of clients.parquet."""
    snapshot: Snapshot
    """A copy, because the coordinator's own state goes on with the next round."""
    evaluation: PendingQuality | None
    """None if the round is not evaluated (``evaluation.every``)."""
    personal: PendingPersonal | None = None
    """Of clients' own models; None if they are not evaluated after this round (``evaluation.personal``)."""

    def is_done(self) -> bool:
        """True if none of its evaluations has to be waited for."""
        return all(one is None or one.is_done() for one in (self.evaluation, self.personal))

    @property
    def progress(self) -> Progress:
        """Where the run stands after the round."""
        return self.snapshot.progress


class PendingRounds:
    """Takes finished rounds and writes them, each once its evaluation is there."""

    def __init__(self, run_dir: RunDirectory, checkpoint: Checkpoint):
        self.run_dir, self.checkpoint = run_dir, checkpoint
        self.baseline: Quality = {}
        self.quality: Quality = {}
        """Of the last round that was evaluated and written."""
        self._baseline: PendingQuality | None = None
        self._open: deque[FinishedRound] = deque()
        self._behind = files.Behind()

    def expect_baseline(self, evaluation: PendingQuality) -> None:
        """The untrained model's quality is on its way. No round waits for it: a run that goes on without it asks again."""
        self._baseline = evaluation
        self._settle_baseline(wait=False)

    def add(self, finished: FinishedRound) -> None:
        """Take a round that is to be written."""
        self._open.append(finished)

    def write(self, *, everything: bool = False) -> Iterator[FinishedRound]:
        """Write the rounds that are ready, in order, and hand each out; wait for those that are too many."""
        self._settle_baseline(wait=everything)
        while self._open:
            first = self._open[0]
            if first.evaluation is not None:
                if not (everything or len(self._open) > MAX_OPEN or first.is_done()):
                    return
                first.row.update(first.evaluation.quality())
                self.quality = first.evaluation.quality()
            personal = None
            if first.personal is not None:
                personal = first.personal.columns()
                first.row.update(first.personal.row())
            first.progress.quality = self.quality
            first.progress.baseline = self.baseline
            self._behind.wait()
            part = self.run_dir.append_round(first.row, first.clients, personal)
            self._behind.begin(self.checkpoint.saving(first.snapshot, after=[part]))
            self._open.popleft()
            yield first
        if everything:
            self._behind.wait()

    def close(self) -> None:
        """Wait for writes under way. Their errors are ignored: whoever closes before the end has an error of its own."""
        self._behind.close()

    def _settle_baseline(self, *, wait: bool) -> None:
        if self._baseline is not None and (wait or self._baseline.is_done()):
            self.baseline = self._baseline.quality()
            self.run_dir.update_meta(baseline=self.baseline)
            self._baseline = None
