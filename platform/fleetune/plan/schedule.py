"""Planners of rounds whose work is only planned: the run's own, and one for fleets too large to draw every batch.

The second takes the lengths of batches by expectation. Who is sampled, their links, who leaves, and how many steps each client
takes are those of the run; these three are replaced:

* tokens of a batch: the expected longest of its b examples drawn without replacement from the client's n,
  E = sum_i l_(i) [C(i, b) - C(i - 1, b)] / C(n, b) over its sorted lengths l_(1) <= … <= l_(n);
* longest example, which decides who is refused: the longest that the client holds;
* positions with logits: those of its mean example; for memory, those of the example that has most.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping

import numpy as np

from fleetune.cost.estimate import Load
from fleetune.cost.polynomials import NUM, monomials
from fleetune.engine.round.planner import Hints, RoundPlanner
from fleetune.engine.round.rules import Outcome
from fleetune.engine.round.work import Work
from fleetune.problem import Problem


class ExpectedRounds(RoundPlanner):
    """Expected lengths of each client's batches, computed once for all rounds."""

    def __init__(self, problem: Problem, *, hints: Hints = "once_per_stage"):
        super().__init__(problem, hints=hints)
        local, data, part = self.spec.local, problem.inputs.train, problem.partition
        owner = np.repeat(np.arange(part.num_clients), self.sizes)  # (n,): the client that holds each example
        self.lengths = lengths = data.lengths[part.indices].astype(float)
        prompts = data.prompt_lengths[part.indices].astype(float)
        by_size = {int(n): local.batches(int(n)) for n in np.unique(self.sizes)}
        kinds = max(1, *map(len, by_size.values()))
        # (kinds, 2, num_clients): a client's batches of one size are a kind: how many there are, and of how many examples.
        self.kinds = np.zeros((kinds, 2, part.num_clients), np.int64)
        for size, batches in by_size.items():
            if not batches or not self.method.traits.draws_batches:
                continue
            self.kinds[: len(batches), :, self.sizes == size] = np.array(batches)[:, ::-1, None]
        self.steps = self.kinds[:, 0].sum(axis=0)  # (num_clients,), as all that follows
        self.longest, self.longest_reference = np.zeros((2, part.num_clients))
        np.maximum.at(self.longest, owner, lengths)
        self.references = None if data.reference is None else data.reference.lengths[part.indices].astype(float)
        if self.references is not None:
            np.maximum.at(self.longest_reference, owner, self.references)
        self.expected = functools.cache(self._expected)
        unlearnt = 1.0 if data.loss_on == "all" else np.maximum(prompts, 1.0)
        learnt = np.maximum(lengths - unlearnt, 0.0)
        self.learnt = np.bincount(owner, learnt, part.num_clients) / np.maximum(self.sizes, 1)
        self.most_learnt = np.zeros(part.num_clients)
        np.maximum.at(self.most_learnt, owner, learnt)

    def batches(self, round_idx: int, client_ids: np.ndarray) -> list[np.ndarray]:
        """None are drawn."""
        return []

    def load(self, work: Work, client_ids: np.ndarray) -> Load:
        """Steps and batches as in the run, lengths by expectation."""
        batch, steps = work.of_clients("batch_size"), self.steps[client_ids]
        mean, largest = np.zeros((len(client_ids), NUM)), np.zeros(len(client_ids), np.int64)
        for kind, (times, examples) in enumerate(self.kinds[:, :, client_ids]):
            examples, padded = np.minimum(examples, batch), np.zeros((2, len(client_ids)))
            for size in np.unique(batch).tolist():
                same = batch == size
                padded[:, same] = self.expected(kind, size)[:, client_ids[same]]
            fraction = times / np.maximum(steps, 1)
            tokens, references = padded
            mean += fraction[:, None] * monomials(examples, tokens, examples * self.learnt[client_ids], references)
            largest = np.maximum(largest, examples)
        most = largest * self.most_learnt[client_ids]
        return Load(steps, mean, monomials(largest, self.longest[client_ids], most, self.longest_reference[client_ids]))

    def new_load(self, work: Work, client_ids: np.ndarray, sent: Mapping[int, str]) -> Load:
        """All of it: which examples a client meets again is not drawn."""
        return self.load(work, client_ids)

    def note_sent(
        self, work: Work, client_ids: np.ndarray, outcome: Outcome, provisioned: MutableMapping[int, str]
    ) -> None:
        """Nothing is noted."""

    def _expected(self, kind: int, batch_size: int) -> np.ndarray:
        """Tokens (2, num_clients) to which batches of a kind, of at most ``batch_size`` examples, are padded.

        The second row is that of the reference paths, 0 if there are none.
        """
        draws, out = np.minimum(self.kinds[kind, 1], batch_size), np.zeros((2, len(self.sizes)))
        for size in np.unique(draws[draws > 0]).tolist():
            same = draws == size
            chosen, sizes = np.repeat(same, self.sizes), self.sizes[same]
            owner = np.repeat(np.arange(len(sizes)), sizes)
            out[0, same] = expected_longest(self.lengths[chosen], owner, sizes, draws=size)
            if self.references is not None:
                out[1, same] = expected_longest(self.references[chosen], owner, sizes, draws=size)
        return out


def expected_longest(lengths: np.ndarray, owner: np.ndarray, sizes: np.ndarray, *, draws: int) -> np.ndarray:
    """Each owner's expected longest of ``draws`` of its lengths, (num_owners,), or the longest if it has no more than that.

    ``owner (n,)`` says whose each of ``lengths (n,)`` is, owners in ascending order; ``sizes (num_owners,)`` are their numbers.
    """
    order = np.lexsort((lengths, owner))
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.arange(len(lengths)) - start[owner]  # of the sorted lengths, from 0
    n = sizes[owner].astype(float)
    taken = np.minimum(draws, n)

    def below(i: np.ndarray) -> np.ndarray:
        """C(i, b) / C(n, b), the chance that all draws are among the i shortest; as a product, which cannot overflow."""
        out = np.ones(len(i))
        for j in range(draws):
            out *= np.where(j < taken, np.maximum(i - j, 0) / np.maximum(n - j, 1), 1.0)
        return out

    chance = below(rank + 1.0) - below(rank.astype(float))
    return np.bincount(owner, lengths[order] * chance, len(sizes))
