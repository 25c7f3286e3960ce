"""Who is sampled, who counts, and when a round ends on the virtual clock."""

from __future__ import annotations

import numpy as np
import pytest

from fleetune.engine.round.rules import Outcome, close_round, sample_clients
from fleetune.spec.run_config import RoundsConfig

SECONDS = np.array([4.0, 2.0, 9.0, 2.0, 1.0])
NOBODY = np.zeros(5, bool)


def closed(over_budget: list[int] | None = None, dropped: list[int] | None = None, **rules: object) -> Outcome:
    """Five clients that take 4, 2, 9, 2 and 1 seconds."""
    refused_by = np.full(5, None, dtype=object)
    refused_by[over_budget or []] = "memory"
    config = RoundsConfig(num_rounds=1, clients_per_round=5, **rules)
    leave = np.isin(np.arange(5), dropped or [])
    return close_round(config, sim_seconds=SECONDS, refused_by=refused_by, dropped=leave)


def test_all_replies_are_waited_for():
    outcome = closed()
    assert outcome.status.tolist() == ["ok"] * 5
    assert outcome.sim_seconds == 9.0


def test_a_refused_client_is_not_waited_for():
    outcome = closed(over_budget=[2])
    assert outcome.status.tolist() == ["ok", "ok", "oom", "ok", "ok"]
    assert outcome.sim_seconds == 4.0
    assert (outcome.count("ok"), outcome.count("oom")) == (4, 1)


def test_a_client_that_leaves_is_waited_for_but_does_not_count():
    """The server cannot know that client 2 will not answer."""
    outcome = closed(dropped=[2])
    assert outcome.status.tolist() == ["ok", "ok", "dropped", "ok", "ok"]
    assert outcome.sim_seconds == 9.0


def test_a_client_that_is_refused_cannot_leave():
    assert closed(over_budget=[2], dropped=[2]).status[2] == "oom"


def test_after_the_deadline_replies_are_late():
    """Four seconds are in time, nine are not; the round ends at the deadline, or before it when all are back."""
    outcome = closed(close="deadline", deadline_seconds=4.0)
    assert outcome.status.tolist() == ["ok", "ok", "late", "ok", "ok"]
    assert outcome.sim_seconds == 4.0
    assert closed(close="deadline", deadline_seconds=20.0).sim_seconds == 9.0
    assert closed(close="deadline", deadline_seconds=0.5).status.tolist() == ["late"] * 5


@pytest.mark.parametrize(
    ("first_k", "status", "seconds"),
    [
        (1, ["late", "late", "late", "late", "ok"], 1.0),
        (2, ["late", "ok", "late", "late", "ok"], 2.0),
        (3, ["late", "ok", "late", "ok", "ok"], 2.0),
        (5, ["ok"] * 5, 9.0),
    ],
)
def test_the_first_k_count(first_k: int, status: list[str], seconds: float):
    """Clients 1 and 3 both take two seconds: of the two the smaller id is first."""
    outcome = closed(close="first_k", first_k=first_k)
    assert outcome.status.tolist() == status
    assert outcome.sim_seconds == seconds


def test_the_first_k_are_counted_among_those_that_answer():
    outcome = closed(close="first_k", first_k=2, over_budget=[4], dropped=[1])
    assert outcome.status.tolist() == ["ok", "dropped", "late", "ok", "oom"]
    assert outcome.sim_seconds == 4.0


def test_with_fewer_than_k_answers_all_are_waited_for():
    outcome = closed(close="first_k", first_k=4, over_budget=[0, 2])
    assert outcome.status.tolist() == ["oom", "ok", "oom", "ok", "ok"]
    assert outcome.sim_seconds == 2.0


def test_a_round_of_refused_clients_takes_no_time():
    outcome = closed(over_budget=[0, 1, 2, 3, 4])
    assert outcome.status.tolist() == ["oom"] * 5
    assert outcome.sim_seconds == 0.0


def test_sampling_is_without_replacement_in_ascending_order():
    eligible = np.array([3, 5, 8, 13, 21, 34])
    for round_idx in range(20):
        ids = sample_clients(eligible, 4, run_seed=0, round_idx=round_idx)
        assert len(set(ids.tolist())) == 4
        assert set(ids.tolist()) <= set(eligible.tolist())
        assert (np.diff(ids) > 0).all()


def test_sampling_depends_on_seed_and_round_alone():
    eligible = np.arange(100)
    drawn = [sample_clients(eligible, 10, run_seed=s, round_idx=t).tolist() for s in range(2) for t in range(3)]
    again = [sample_clients(eligible, 10, run_seed=s, round_idx=t).tolist() for s in range(2) for t in range(3)]
    assert drawn == again
    assert len({tuple(ids) for ids in drawn}) == 6


def test_every_client_gets_its_turn():
    """1,000 rounds of 5 of 20: each client is expected 250 times; six standard deviations are 82."""
    counts = np.zeros(20)
    for round_idx in range(1000):
        counts[sample_clients(np.arange(20), 5, run_seed=0, round_idx=round_idx)] += 1
    assert np.abs(counts - 250).max() < 82
