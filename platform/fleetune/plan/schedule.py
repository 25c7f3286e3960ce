"""The schedule of a fleet so large that its batches are not drawn: their lengths are taken by expectation.

Who is sampled, their links, who leaves, and how many steps each takes are those of the run. What is replaced:

* tokens of a batch: the expected longest of b examples drawn without replacement from the client's n,
  E = sum_i l_(i) [C(i, b) - C(i - 1, b)] / C(n, b) over its sorted lengths l_(1) <= … <= l_(n);
* longest example, which decides who is refused: the longest that the client holds;
* the share of positions with logits: that of the sampled clients' examples.
"""

from __future__ import annotations

import functools

import numpy as np

from fleetune.engine.costs import Load
from fleetune.engine.problem import Problem
from fleetune.engine.schedule import Schedule
from fleetune.engine.work import Work


class ExpectedSchedule(Schedule):
    """Lengths per client, worked out once for all rounds."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        local, data, part = self.spec.local, problem.inputs.train, problem.partition
        owner = np.repeat(np.arange(part.num_clients), self.sizes)
        lengths = data.lengths[part.indices].astype(float)
        prompts = data.prompt_lengths[part.indices].astype(float)
        by_size = {int(n): local.num_steps(int(n)) for n in np.unique(self.sizes)}
        steps = np.array([by_size[int(n)] for n in self.sizes])
        self.steps = steps if self.method.draws_batches else np.zeros_like(steps)
        self.longest = np.zeros(part.num_clients)
        np.maximum.at(self.longest, owner, lengths)
        self.expected = functools.cache(
            lambda batch_size: expected_longest(lengths, owner, self.sizes, draws=batch_size)
        )
        held = np.maximum(self.sizes, 1)
        self.tokens = np.bincount(owner, lengths, part.num_clients) / held
        self.prompt_tokens = np.bincount(owner, prompts, part.num_clients) / held

    def batches(self, round_idx: int, client_ids: np.ndarray) -> list[np.ndarray]:
        """None are drawn."""
        return []

    def load(self, work: Work, client_ids: np.ndarray) -> Load:
        """Steps as in the run, lengths by expectation."""
        steps = self.steps[client_ids]
        if not steps.any():
            zero = np.zeros(len(client_ids))
            return Load(steps, zero, zero, 1.0)
        prompt = float((steps * self.prompt_tokens[client_ids]).sum() / (steps * self.tokens[client_ids]).sum())
        fraction = 1.0 if self.problem.inputs.train.loss_on == "all" else 1.0 - prompt
        batch_sizes, padded = work.of_clients("batch_size"), np.zeros(len(client_ids))
        for size in np.unique(batch_sizes).tolist():
            mine = batch_sizes == size
            padded[mine] = self.expected(size)[client_ids[mine]]
        return Load(steps, padded, self.longest[client_ids], fraction)


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
