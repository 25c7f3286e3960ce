"""Batches for training and prompts for generation, gathered from the flat arrays without a loop."""

from __future__ import annotations

import numpy as np

from fleetune.data.dataset import TokenizedDataset
from fleetune.seeds import rng

IGNORED = -100  # the label of a token that is not learnt: PyTorch's cross_entropy(ignore_index=-100)


def draw_batches(shard: np.ndarray, *, num_steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Examples for every step, int64 ``(num_steps, batch_size)``: shuffles of the shard ``(n,)``, end to end.

    Every batch is full: where a shuffle ends the next one goes on, so a shard smaller than a batch repeats
    within it. Raises ValueError for an empty shard. ``seed``: of this client and round.
    """
    if len(shard) == 0:
        raise ValueError("no batches from an empty shard; a client without examples is not to be trained")
    needed = num_steps * batch_size
    num_epochs = -(-needed // len(shard))
    epochs = np.tile(np.asarray(shard, dtype=np.int64), (num_epochs, 1))
    shuffled = rng(seed, "draw_batches").permuted(epochs, axis=1)
    return shuffled.reshape(-1)[:needed].reshape(num_steps, batch_size)


def collate(dataset: TokenizedDataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels int64 ``(n, S)`` of examples ``rows`` ``(n,)``, right-padded to the longest, S.

    ``labels[:, t]`` is the target *at* position t, predicted from the tokens before it: the token itself
    where it is learnt, -100 elsewhere. The shift by one is the trainer's.
    """
    starts = dataset.offsets[rows]
    ends = dataset.offsets[rows + 1] - starts
    position = np.arange(ends.max())
    inside = position < ends[:, None]
    ids = _gather(dataset, starts[:, None] + position, inside)
    learnt = inside if dataset.loss_on == "all" else inside & (position >= dataset.prompt_lengths[rows][:, None])
    return ids, np.where(learnt, ids, IGNORED)


def eval_prompts(dataset: TokenizedDataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompts to be continued: token ids and attention mask int64 ``(n, S)``, left-padded to the longest."""
    sizes = dataset.prompt_lengths[rows].astype(np.int64)
    longest = sizes.max()
    position = np.arange(longest) - (longest - sizes)[:, None]  # negative in the padding
    inside = position >= 0
    return _gather(dataset, dataset.offsets[rows][:, None] + position, inside), inside.astype(np.int64)


def _gather(dataset: TokenizedDataset, index: np.ndarray, inside: np.ndarray) -> np.ndarray:
    ids = dataset.tokens.take(index, mode="clip").astype(np.int64)
    return np.where(inside, ids, dataset.pad_token_id)
