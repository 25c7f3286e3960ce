"""Batches for training and prompts for generation, gathered from the flat arrays without a loop."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fleetune.data.dataset import TokenizedDataset
from fleetune.seeds import rng

NO_EXAMPLE = -1  # in an array of rows: fills up a batch that has fewer examples
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


def draw_epochs(shard: np.ndarray, passes: Iterable[tuple[int, int]], *, batch_size: int, seed: int) -> np.ndarray:
    """Examples for every step, int64 ``(num_steps, batch_size)``: passes over the shard ``(n,)``, each shuffled anew.

    ``passes``: (examples, times); a pass of n examples sees each once, one of fewer as many different ones. The last batch
    of a pass holds what is left, and is filled up with `NO_EXAMPLE`. Raises ValueError for an empty shard.
    """
    if len(shard) == 0:
        raise ValueError("no batches from an empty shard; a client without examples is not to be trained")
    generator = rng(seed, "draw_epochs")
    out = []
    for size, times in passes:
        shuffled = generator.permuted(np.tile(np.asarray(shard, dtype=np.int64), (times, 1)), axis=1)[:, :size]
        filled = np.pad(shuffled, ((0, 0), (0, -size % batch_size)), constant_values=NO_EXAMPLE)
        out.append(filled.reshape(-1, batch_size))
    return np.concatenate(out)


def without(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The batches ``rows (steps, b)`` without ``known`` examples and without those of earlier steps, for the caller to work on.

    What is left of a batch comes first in it, filled up with `NO_EXAMPLE`; steps of which nothing is left are left out.
    """
    seen = set(known.tolist())
    out = np.full_like(rows, NO_EXAMPLE)
    for step, batch in enumerate(rows.tolist()):
        new = [row for row in dict.fromkeys(batch) if row != NO_EXAMPLE and row not in seen]
        out[step, : len(new)] = new
        seen.update(new)
    return out[(out != NO_EXAMPLE).any(axis=1)]


def collate(dataset: TokenizedDataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels int64 ``(n, S)`` of examples ``rows`` ``(n,)``, right-padded to the longest, S.

    A row that is `NO_EXAMPLE` is padding alone, of which nothing is learnt.
    ``labels[:, t]`` is the target *at* position t, predicted from the tokens before it: the token itself
    where it is learnt, -100 elsewhere. The shift by one is the trainer's.
    """
    starts, ends = dataset.offsets[rows], num_tokens(dataset, rows)
    position = np.arange(ends.max())
    inside = position < ends[:, None]
    ids = _gather(dataset, starts[:, None] + position, inside)
    learnt = inside if dataset.loss_on == "all" else inside & (position >= dataset.prompt_lengths[rows][:, None])
    return ids, np.where(learnt, ids, IGNORED)


def num_tokens(dataset: TokenizedDataset, rows: np.ndarray) -> np.ndarray:
    """Tokens of each example, int64 of the shape of ``rows``; 0 for `NO_EXAMPLE`."""
    return np.where(rows == NO_EXAMPLE, 0, dataset.offsets[rows + 1] - dataset.offsets[rows])


def eval_prompts(dataset: TokenizedDataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompts to be continued: token ids and attention mask int64 ``(n, S)``, left-padded to the longest, S."""
    sizes = dataset.prompt_lengths[rows].astype(np.int64)
    longest = sizes.max()
    position = np.arange(longest) - (longest - sizes)[:, None]  # negative in the padding
    inside = position >= 0
    return _gather(dataset, dataset.offsets[rows][:, None] + position, inside), inside.astype(np.int64)


def _gather(dataset: TokenizedDataset, index: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Token ids ``(n, S)`` at ``index`` ``(n, S)`` into the flat tokens, and padding wherever ``inside`` is False."""
    # Outside of its text an index may point past the last token: mode="clip" reads any, and padding replaces it.
    ids = dataset.tokens.take(index, mode="clip").astype(np.int64)
    return np.where(inside, ids, dataset.pad_token_id)
