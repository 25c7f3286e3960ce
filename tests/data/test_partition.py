"""Who holds which example: each exactly once, skewed as asked, and fast for many clients."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pydantic import ValidationError

from fleetune.data.config import PartitionConfig
from fleetune.data.partition import Partition, hold_out, partition, partition_keys
from fleetune.data.records import Examples
from fleetune.errors import UserError

KINDS = ["iid", "dirichlet", "shards", "by_key", "quantity"]


def deal(num_examples: int, num_clients: int, *, num_keys: int = 4, seed: int = 0, **config):
    keys = np.arange(num_examples) % num_keys
    return partition(PartitionConfig(**config), num_clients=num_clients, keys=keys, seed=seed), keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_examples", "num_clients"), [(100, 7), (12, 3), (40, 1), (37, 18)])
def test_every_example_is_dealt_exactly_once(kind, num_examples, num_clients):
    dealt, _ = deal(num_examples, num_clients, kind=kind)
    shards = [dealt.shard(client_id) for client_id in range(num_clients)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(num_examples))
    assert dealt.sizes.tolist() == [len(shard) for shard in shards]
    assert dealt.num_clients == num_clients
    assert all((np.diff(shard) > 0).all() for shard in shards)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "quantity"])
def test_the_seed_decides(kind):
    one, same, other = (deal(200, 10, kind=kind, seed=seed)[0].indices for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_iid_sizes_differ_by_at_most_one():
    dealt, _ = deal(23, 5, kind="iid")
    assert sorted(dealt.sizes.tolist()) == [4, 4, 5, 5, 5]


def test_a_shard_is_a_view():
    dealt, _ = deal(23, 5, kind="iid")
    assert np.shares_memory(dealt.shard(2), dealt.indices)


def mean_largest_fraction(alpha: float) -> float:
    """The share of a client's most frequent of 4 categories, 1/4 (even) to 1, its mean over 10 clients."""
    dealt, keys = deal(4_000, 10, kind="dirichlet", alpha=alpha)
    counts = np.stack([np.bincount(keys[dealt.shard(k)], minlength=4) for k in range(10)])
    counts = counts[counts.sum(axis=1) > 0]
    return float((counts.max(axis=1) / counts.sum(axis=1)).mean())


def test_a_small_alpha_gives_each_client_few_categories_and_a_large_one_all():
    assert mean_largest_fraction(0.05) > 0.75
    assert mean_largest_fraction(1_000.0) < 0.3
    assert mean_largest_fraction(1_000.0) < mean_largest_fraction(1.0) < mean_largest_fraction(0.05)


def test_dirichlet_shares_have_the_distribution_they_are_named_after():
    """Of Dirichlet(a, … a) over K clients, a share has mean 1/K and variance (K-1) / (K^2 (K a + 1)).

    For K = 2 and a = 0.5, over 400 categories of 100 examples: mean 1/2, variance 1 / (4 * 2) = 0.125.
    """
    keys = np.repeat(np.arange(400), 100)
    dealt = partition(PartitionConfig(kind="dirichlet", alpha=0.5), num_clients=2, keys=keys, seed=0)
    shares = np.bincount(keys[dealt.shard(0)], minlength=400) / 100
    assert shares.mean() == pytest.approx(0.5, abs=0.06)
    assert shares.var() == pytest.approx(0.125, abs=0.015)


def test_quantity_skews_sizes_and_leaves_mixtures_alike():
    dealt, keys = deal(8_000, 10, kind="quantity", alpha=0.5)
    assert dealt.sizes.max() > 4 * np.median(dealt.sizes)
    largest = dealt.shard(int(dealt.sizes.argmax()))
    assert np.bincount(keys[largest]) / len(largest) == pytest.approx([0.25] * 4, abs=0.05)


def test_shards_show_each_client_few_categories():
    """10 categories of 20, 10 clients x 2 shards of 10: none crosses a category, so 1 or 2 a client."""
    dealt, keys = deal(200, 10, num_keys=10, kind="shards", shards_per_client=2)
    assert dealt.sizes.tolist() == [20] * 10
    assert {len(set(keys[dealt.shard(k)].tolist())) for k in range(10)} <= {1, 2}


def test_by_key_keeps_keys_whole_and_balances():
    """Keys of 6, 5, 4, 3, 2 examples on 2 clients: 6 | 5, then 4 to the 5 (9), 3 to the 6 (9), 2 to one."""
    keys = np.repeat([30, 10, 20, 50, 40], [6, 5, 4, 3, 2])
    dealt = partition(PartitionConfig(kind="by_key"), num_clients=2, keys=keys, seed=0)
    assert sorted(dealt.sizes.tolist()) == [9, 11]
    holders = [set(keys[dealt.shard(k)].tolist()) for k in range(2)]
    assert holders[0].isdisjoint(holders[1])


def test_more_clients_than_keys_leaves_clients_without_examples():
    dealt, _ = deal(40, 6, num_keys=4, kind="by_key")
    assert sorted(dealt.sizes.tolist()) == [0, 0, 10, 10, 10, 10]
    assert dealt.shard(int(dealt.sizes.argmin())).tolist() == []


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_min_examples_fills_up_the_short_from_the_largest(kind):
    free, _ = deal(200, 20, kind=kind, alpha=0.1)
    filled, _ = deal(200, 20, kind=kind, alpha=0.1, min_examples=5)
    assert free.sizes.min() < 5
    assert filled.sizes.min() == 5
    assert sorted(filled.indices.tolist()) == list(range(200))
    unharmed = (free.sizes >= 5) & (free.sizes <= filled.sizes.max())
    assert (filled.sizes[unharmed] >= free.sizes[unharmed] - 1).all()
    for k in np.flatnonzero(free.sizes < 5):
        assert set(free.shard(k).tolist()) <= set(filled.shard(k).tolist())


def test_min_examples_may_use_up_all():
    dealt, _ = deal(60, 20, kind="quantity", alpha=0.1, min_examples=3)
    assert dealt.sizes.tolist() == [3] * 20


def test_ten_times_as_many_clients_take_some_ten_times_as_long():
    """And not a hundred times, as they would if each client were compared with each other."""

    def seconds(num_clients: int, kind: str) -> float:
        start = time.process_time()
        dealt, _ = deal(10 * num_clients, num_clients, num_keys=20, kind=kind)
        assert dealt.num_clients == num_clients
        return time.process_time() - start

    for kind in KINDS:
        few, many = (min(seconds(num_clients, kind) for _ in range(3)) for num_clients in (1_000, 10_000))
        assert many < 40 * few, kind


def labelled(has_categories: bool = True) -> Examples:
    category = ["b", "a", "b"] if has_categories else ["all"] * 3
    columns = {"prompt": ["p"] * 3, "response": ["r"] * 3, "category": category, "writer": ["z", "y", "x"]}
    return Examples(columns=columns, has_categories=has_categories)


def test_keys_are_the_codes_of_the_named_column():
    assert partition_keys(labelled(), config=PartitionConfig(kind="dirichlet")).tolist() == [1, 0, 1]
    config = PartitionConfig(kind="by_key", key="writer")
    assert partition_keys(labelled(), config=config).tolist() == [2, 1, 0]
    assert partition_keys(labelled(False), config=PartitionConfig()).tolist() == [0, 0, 0]


def test_faults_name_the_field_and_the_way_out():
    with pytest.raises(UserError, match=r"data\.partition\.key='writter'.*did you mean 'writer'"):
        partition_keys(labelled(), config=PartitionConfig(kind="by_key", key="writter"))
    with pytest.raises(UserError, match=r"goes by category.*name one of: prompt, response, writer"):
        partition_keys(labelled(False), config=PartitionConfig(kind="dirichlet"))
    with pytest.raises(UserError, match=r"min_examples: 20 clients cannot have 6 of 100 examples"):
        deal(100, 20, kind="iid", min_examples=6)
    with pytest.raises(UserError, match=r"60 clients x 2 shards are more than 100 examples"):
        deal(100, 60, kind="shards")
    with pytest.raises(ValidationError, match="min_examples must be 0"):
        PartitionConfig(kind="by_key", min_examples=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_is_divided_into_a_training_part_and_a_held_out_part(kind):
    """Of n examples a fifth, rounded, is held out; the seed decides which; nothing is lost."""
    dealt, _ = deal(300, 7, kind=kind)
    (train, own), (same, _), (other, _) = (hold_out(dealt, 0.2, seed=seed) for seed in (1, 1, 2))
    for client in range(7):
        parts = [train.shard(client), own.shard(client)]
        assert sorted(np.concatenate(parts).tolist()) == dealt.shard(client).tolist()
        assert all((np.diff(part) > 0).all() for part in parts)
    assert own.sizes.tolist() == [max(1, round(0.2 * n)) if n > 1 else 0 for n in dealt.sizes.tolist()]
    assert np.array_equal(train.indices, same.indices)
    assert not np.array_equal(train.indices, other.indices)


@pytest.mark.parametrize(
    ("size", "fraction", "held"), [(0, 0.5, 0), (1, 0.9, 0), (2, 0.01, 1), (2, 0.99, 1), (10, 0.99, 9)]
)
def test_a_client_keeps_an_example_to_train_on(size, fraction, held):
    """At least one of two or more is held out, at most all but one; a single one is trained on."""
    shards = Partition(np.arange(size), np.array([0, size]))
    train, own = hold_out(shards, fraction, seed=0)
    assert (train.sizes.tolist(), own.sizes.tolist()) == ([size - held], [held])
