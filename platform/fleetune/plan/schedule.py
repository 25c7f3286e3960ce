"""The schedule of a fleet so large that its batches are not drawn: their lengths are taken by expectation.

Who is sampled, their links, who leaves, and how many steps each takes are those of the run. What is replaced:

* tokens of a batch: the expected longest of its b examples drawn without replacement from the client's n,
  E = sum_i l_(i) [C(i, b) - C(i - 1, b)] / C(n, b) over its sorted lengths l_(1) <= … <= l_(n);
* longest example, which decides who is refused: the longest that the client holds;
* positions with logits: those of its mean example; for memory, of the one that has most.

What would fit a refused client is worked out in the first round of a stage alone.
"""

from __future__ import annotations

import functools

import numpy as np

from fleetune.cost.estimate import Load
from fleetune.cost.polynomials import NUM, monomials
from fleetune.engine.round.planner import RoundPlanner
from fleetune.engine.round.work import Work
from fleetune.problem import Problem


class ExpectedRounds(RoundPlanner):
    """Lengths per client, worked out once for all rounds."""

    def __init__(self, problem: Problem):
        super().__init__(problem, hints_once_per_stage=True)
        local, data, part = self.spec.local, problem.inputs.train, problem.partition
        owner = np.repeat(np.arange(part.num_clients), self.sizes)
        self.lengths = lengths = data.lengths[part.indices].astype(float)
        prompts = data.prompt_lengths[part.indices].astype(float)
        by_size = {int(n): local.batches(int(n)) for n in np.unique(self.sizes)}
        kinds = max(1, *map(len, by_size.values()))
        self.kinds = np.zeros((kinds, 2, part.num_clients), np.int64)
        """Batches that are alike, of each client: how many of them, and of how many examples."""
        for size, batches in by_size.items():
            if not batches or not self.method.draws_batches:
                continue
            self.kinds[: len(batches), :, self.sizes == size] = np.array(batches)[:, ::-1, None]
        self.steps = self.kinds[:, 0].sum(axis=0)
        self.longest = np.zeros(part.num_clients)
        np.maximum.at(self.longest, owner, lengths)
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
            examples, padded = np.minimum(examples, batch), np.zeros(len(client_ids))
            for size in np.unique(batch).tolist():
                mine = batch == size
                padded[mine] = self.expected(kind, size)[client_ids[mine]]
            fraction = times / np.maximum(steps, 1)
            mean += fraction[:, None] * monomials(examples, padded, examples * self.learnt[client_ids])
            largest = np.maximum(largest, examples)
        return Load(steps, mean, monomials(largest, self.longest[client_ids], largest * self.most_learnt[client_ids]))

    def _expected(self, kind: int, batch_size: int) -> np.ndarray:
        """Tokens to which each client's batches of a kind are padded, no more than ``batch_size`` examples in each."""
        draws, out = np.minimum(self.kinds[kind, 1], batch_size), np.zeros(len(self.sizes))
        for size in np.unique(draws[draws > 0]).tolist():
            mine = draws == size
            lengths, sizes = self.lengths[np.repeat(mine, self.sizes)], self.sizes[mine]
            out[mine] = expected_longest(lengths, np.repeat(np.arange(len(sizes)), sizes), sizes, draws=size)
        return out


def expected_longest(lengths: np.ndarray, owner: np.ndarray, sizes: np.ndarray, *, draws: int) -> np.ndarray:
    """Each owner's expected longest of ``draws`` of its lengths, (num_owners,); all of them where it has no more.

    ``lengths`` and ``owner``, both (n,): whose length it is, owners in ascending order.
    """
    order = np.lexsort((lengths, owner))
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.arange(len(lengths)) - start[owner]  # of the sorted lengths, from 0
    n = sizes[owner].astype(float)
    taken = np.minimum(draws, n)

    def below(i: np.ndarray) -> np.ndarray:
        """C(i, b) / C(n, b): that all draws are among the i shortest."""
        out = np.ones(len(i))
        for j in range(draws):
            out *= np.where(j < taken, np.maximum(i - j, 0) / np.maximum(n - j, 1), 1.0)
        return out

    chance = below(rank + 1.0) - below(rank.astype(float))
    return np.bincount(owner, lengths[order] * chance, len(sizes))
