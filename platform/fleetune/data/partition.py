"""Deals the examples to the clients, as flat arrays, so that 10,000 clients cost no Python object each.

iid       equal sizes at random (they differ by at most 1).
dirichlet label skew: each category is spread over the clients in proportions drawn from Dirichlet(alpha);
          sizes are skewed with it. Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022, and NIID-Bench,
          https://arxiv.org/abs/2102.02079. (Hsu et al. 2019, https://arxiv.org/abs/1909.06335, draw a mixture
          for each of equally large clients instead, and so cannot deal every example exactly once.)
shards    the examples sorted by category and cut into equal pieces, a few dealt to each client.
          McMahan et al. 2017, https://arxiv.org/abs/1602.05629.
by_key    all examples of a key on one client: the largest keys first, each to the client with the fewest.
quantity  sizes drawn from Dirichlet(alpha), the same mixture everywhere; also in NIID-Bench.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from fleetune.data.config import PartitionConfig
from fleetune.data.records import Examples, category_codes
from fleetune.errors import UserError, unknown_name
from fleetune.seeds import rng


@dataclass(frozen=True)
class Partition:
    """The shards of all clients: client k's examples are ``indices[offsets[k]:offsets[k + 1]]``, ascending."""

    indices: np.ndarray
    """int64 ``(n,)``: rows of the dataset, client by client"""
    offsets: np.ndarray
    """int64 ``(num_clients + 1,)``: where each client's begin in ``indices``"""

    def shard(self, client_id: int) -> np.ndarray:
        """The client's examples, a view; may be empty."""
        return self.indices[self.offsets[client_id] : self.offsets[client_id + 1]]

    @property
    def num_clients(self) -> int:
        """Clients, those without examples included."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Examples per client, int64 ``(num_clients,)``."""
        return np.diff(self.offsets)


def partition_keys(examples: Examples, *, config: PartitionConfig) -> np.ndarray:
    """The codes int64 ``(n,)`` by which the partition goes: those of the column ``config.key``."""
    if config.kind in ("iid", "quantity"):
        return np.zeros(len(examples), dtype=np.int64)
    if config.key not in examples.columns:
        raise unknown_name("column", config.key, examples.columns, field="data.partition.key")
    if config.key == "category" and not examples.has_categories:
        known = ", ".join(name for name in examples.columns if name != "category")
        rule = f"kind={config.kind} goes by category, and the source has no such column"
        raise UserError(rule, field="data.partition.key", hint=f"name one of: {known}; or use kind: iid")
    codes, _ = category_codes(examples[config.key])
    return codes


def partition(config: PartitionConfig, *, num_clients: int, keys: np.ndarray, seed: int) -> Partition:
    """Deal the n examples to the clients; ``keys`` int ``(n,)`` are those of ``partition_keys``."""
    num_examples = len(keys)
    if num_clients * config.min_examples > num_examples:
        rule = f"{num_clients} clients cannot have {config.min_examples} of {num_examples} examples each"
        raise UserError(rule, field="data.partition.min_examples", hint="use more examples or fewer clients")
    generator = rng(seed, "partition")
    if config.kind == "iid":
        owners = _even(num_examples, num_clients, generator)
    elif config.kind == "dirichlet":
        owners = _dirichlet(keys, num_clients, config.alpha, generator)
    elif config.kind == "shards":
        owners = _shards(keys, num_clients, config.shards_per_client, generator)
    elif config.kind == "by_key":
        owners = _by_key(keys, num_clients, generator)
    else:
        owners = _dirichlet(np.zeros_like(keys), num_clients, config.alpha, generator)
    if config.min_examples:
        owners = _fill_up(owners, num_clients, config.min_examples, generator)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=num_clients))])
    return Partition(indices=np.argsort(owners, kind="stable"), offsets=offsets)


def hold_out(shards: Partition, fraction: float, *, seed: int) -> tuple[Partition, Partition]:
    """Each client's training part and its held-out part, drawn at random from its shard; both keep the order of the examples.

    Of n examples round(fraction * n) are held out, but one at least and n - 1 at most, so that every client that can train still
    can. One example cannot be divided: it is trained on.
    """
    num_clients, sizes = shards.num_clients, shards.sizes
    owners = np.repeat(np.arange(num_clients), sizes)  # (n,): client by client, as the indices
    wanted = np.clip(np.rint(fraction * sizes).astype(np.int64), np.minimum(1, sizes), np.maximum(sizes - 1, 0))
    order = np.lexsort((rng(seed, "held_out").random(len(owners)), owners))  # each client's examples, shuffled
    starts = shards.offsets[:-1]
    is_held = np.zeros(len(owners), dtype=bool)
    is_held[order] = np.arange(len(owners)) - starts[owners] < wanted[owners]
    return _taken(shards, ~is_held, sizes - wanted), _taken(shards, is_held, wanted)


def _taken(shards: Partition, mask: np.ndarray, sizes: np.ndarray) -> Partition:
    """The examples of a partition for which ``mask (n,)`` is true, ``sizes (num_clients,)`` of them on each client."""
    return Partition(indices=shards.indices[mask], offsets=np.concatenate([[0], np.cumsum(sizes)]))


def _even(num_examples: int, num_clients: int, generator: Generator) -> np.ndarray:
    """Owners ``(n,)`` of a shuffled round deal."""
    return generator.permutation(np.arange(num_examples) % num_clients)


def _dirichlet(keys: np.ndarray, num_clients: int, alpha: float, generator: Generator) -> np.ndarray:
    """Owners ``(n,)``: each key's shuffled examples, cut at cumulated proportions ~ Dirichlet(alpha)."""
    owners = np.empty(len(keys), dtype=np.int64)
    by_key = np.argsort(keys, kind="stable")
    for rows in np.split(by_key, np.flatnonzero(np.diff(keys[by_key])) + 1):
        bounds = np.cumsum(generator.dirichlet(np.full(num_clients, alpha)))
        positions = (np.arange(len(rows)) + 0.5) / len(rows)
        drawn = np.searchsorted(bounds, positions, side="right")
        owners[generator.permutation(rows)] = np.minimum(drawn, num_clients - 1)  # bounds end at 1 up to rounding
    return owners


def _shards(keys: np.ndarray, num_clients: int, per_client: int, generator: Generator) -> np.ndarray:
    """Owners ``(n,)``: pieces of the key-sorted examples, ``per_client`` of them to each client."""
    num_shards = num_clients * per_client
    if num_shards > len(keys):
        rule = f"{num_clients} clients x {per_client} shards are more than {len(keys)} examples"
        raise UserError(rule, field="data.partition.shards_per_client", hint="use more examples or fewer clients")
    shuffled = generator.permutation(len(keys))
    by_key = shuffled[np.argsort(keys[shuffled], kind="stable")]
    shard_owners = generator.permutation(np.arange(num_shards) % num_clients)
    owners = np.empty(len(keys), dtype=np.int64)
    owners[by_key] = shard_owners[np.arange(len(keys)) * num_shards // len(keys)]
    return owners


def _by_key(keys: np.ndarray, num_clients: int, generator: Generator) -> np.ndarray:
    """Owners ``(n,)``: largest key first, each to the client with the fewest examples; ties at random."""
    _, codes, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    ties = generator.permutation(num_clients).tolist()
    loads = [(0, tie, client_id) for client_id, tie in enumerate(ties)]
    heapq.heapify(loads)
    owner_of_key = np.empty(len(sizes), dtype=np.int64)
    for key in np.argsort(-sizes, kind="stable").tolist():
        load, tie, client_id = loads[0]
        owner_of_key[key] = client_id
        heapq.heapreplace(loads, (load + int(sizes[key]), tie, client_id))
    return owner_of_key[codes]


def _fill_up(owners: np.ndarray, num_clients: int, minimum: int, generator: Generator) -> np.ndarray:
    """Owners with at least ``minimum`` examples each: the largest clients give some of theirs, at random."""
    sizes = np.bincount(owners, minlength=num_clients)
    missing = np.maximum(minimum - sizes, 0)
    needed = int(missing.sum())
    cap = _highest_cap(sizes, needed)
    shuffled = generator.permutation(len(owners))
    by_owner = shuffled[np.argsort(owners[shuffled], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(owners)) - np.repeat(starts, sizes)
    surplus = generator.permutation(by_owner[rank >= cap])[:needed]
    filled = owners.copy()
    filled[surplus] = np.repeat(np.arange(num_clients), missing)
    return filled


def _highest_cap(sizes: np.ndarray, needed: int) -> int:
    """The highest size to which larger clients can be cut so that ``needed`` examples or more come free."""
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if np.maximum(sizes - middle, 0).sum() >= needed:
            low = middle
        else:
            high = middle - 1
    return low
