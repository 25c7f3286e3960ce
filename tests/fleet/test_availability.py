"""Who can be asked when: draws, two states in virtual time, trace files, and rounds that have too few clients or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fleetune.engine.round.rules import open_round, sample_clients
from fleetune.errors import UserError
from fleetune.fleet.availability import AvailabilityConfig, TwoStates, build_availability
from fleetune.fleet.availability_trace import read_trace
from fleetune.fleet.fleet import FleetConfig, build_fleet
from support import runs, tiny

FAST = {"evaluation.generate": False}
EVERYONE = np.arange(4)


def availability(num_clients: int = 4, seed: int = 0, **fields: Any) -> Any:
    return build_availability(AvailabilityConfig(**fields), num_clients, run_seed=seed, trace=None)


def trace(folder: Path, text: str, *, num_clients: int = 4, suffix: str = ".csv") -> str:
    path = folder / f"trace{suffix}"
    path.write_text(text)
    return str(path)


def from_trace(folder: Path, text: str) -> Any:
    """Four clients: 0 and 1 on a jetson-nano, 2 and 3 on a jetson-tx2."""
    config = AvailabilityConfig(kind="trace", path=trace(folder, text))
    names, index = ["jetson-nano", "jetson-tx2"], np.array([0, 0, 1, 1])
    read = read_trace(str(config.path), device_names=names, device_index=index)
    return build_availability(config, 4, run_seed=0, trace=read)


def test_without_a_word_everybody_is_always_there():
    always = availability()
    assert always.at(7, 1e9).all()
    assert np.isinf(always.until(0.0)).all()


def test_a_draw_is_for_each_client_and_round():
    """A share of 0.3 of 10,000 clients, anew each round: both rounds 0.09; and virtual time plays no part."""
    drawn = availability(10_000, kind="bernoulli", probability=0.3)
    first, second = drawn.at(0, 0.0), drawn.at(1, 0.0)
    assert first.mean() == pytest.approx(0.3, abs=0.02)
    assert (first & second).mean() == pytest.approx(0.09, abs=0.02)
    assert (drawn.at(0, 1e6) == first).all()
    assert drawn.next_change(0.0, np.arange(10_000)) is None


def two_states(num_clients: int = 10_000, seed: int = 0) -> TwoStates:
    return TwoStates(num_clients, run_seed=seed, mean_on_seconds=300.0, mean_off_seconds=100.0)


def test_two_states_are_in_equilibrium_from_the_start():
    """On for 300 s and off for 100 s on average: three quarters are on at any time, and a stay on lasts 300 s more."""
    states = two_states()
    for seconds in (0.0, 50.0, 1000.0, 5000.0):
        on = states.at(0, seconds)
        assert on.mean() == pytest.approx(0.75, abs=0.02)
        assert (states.until(seconds)[on] - seconds).mean() == pytest.approx(300.0, rel=0.05)


def test_two_states_do_not_depend_on_who_asked_before():
    """Asked at 2,000 s at once, or after many other times, or going back: the same clients are on, until the same time."""
    asked_once, asked_often = two_states(100), two_states(100)
    for seconds in (0.0, 3.0, 700.0, 9000.0, 1999.0):
        asked_often.at(0, seconds)
    assert (asked_once.at(0, 2000.0) == asked_often.at(0, 2000.0)).all()
    assert (asked_once.until(2000.0) == asked_often.until(2000.0)).all()
    assert (asked_once.at(0, 2000.0) != two_states(100, seed=1).at(0, 2000.0)).any()


def test_a_client_stays_until_the_time_that_was_told():
    """Just before it a client that is on is still on; then it is off, until the next change."""
    states = two_states(1)
    off = float(states.until(0.0)[0]) if states.at(0, 0.0)[0] else 0.0
    assert not states.at(0, off)[0] or off == 0.0
    back = states.next_change(off, np.array([0]))
    assert back is not None
    assert back > off
    assert states.at(0, back)[0]
    assert not states.at(0, back - 1e-6)[0]


def test_a_trace_gives_intervals_by_client(tmp_path: Path):
    """Client 0 twice, client 2 once; where two intervals touch they are one stay; the end is no longer in it."""
    read = from_trace(tmp_path, "client_id,start_seconds,end_seconds\n0,10,20\n0,0,5\n2,5,12\n0,20,30\n")
    assert read.at(0, 0.0).tolist() == [True, False, False, False]
    assert read.at(0, 5.0).tolist() == [False, False, True, False]
    assert read.at(0, 11.0).tolist() == [True, False, True, False]
    assert read.until(11.0)[[0, 2]].tolist() == [30.0, 12.0]
    assert read.next_change(6.0, np.array([0])) == 10.0
    assert read.next_change(6.0, np.array([1, 3])) is None
    assert read.next_change(30.0, EVERYONE) is None


def test_a_trace_may_speak_of_devices(tmp_path: Path):
    read = from_trace(tmp_path, "device,start_seconds,end_seconds\njetson-tx2,0,8\njetson-nano,4,6\n")
    assert read.at(0, 5.0).tolist() == [True] * 4
    assert read.at(0, 7.0).tolist() == [False, False, True, True]


def test_a_trace_may_be_a_parquet_file(tmp_path: Path):
    path = tmp_path / "trace.parquet"
    pd.DataFrame({"client_id": [1], "start_seconds": [0.0], "end_seconds": [2.5]}).to_parquet(path)
    read = read_trace(str(path), device_names=["jetson-nano"], device_index=np.zeros(3, np.int16))
    assert (read.client_ids.tolist(), read.end_seconds.tolist()) == ([1], [2.5])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("client_id,start_seconds\n0,1\n", "has no column end_seconds .it has client_id, start_seconds"),
        ("start_seconds,end_seconds\n0,1\n", "has no column client_id or device"),
        ("client_id,device,start_seconds,end_seconds\n0,jetson-nano,0,1\n", "has both client_id and device"),
        ("client_id,start_seconds,end_seconds\n0,0,5\n1,9,3\n", "line 3: ends no later than it starts, at 3"),
        ("client_id,start_seconds,end_seconds\n\n0,-4,5\n", "line 3: starts before the run, at -4"),
        ("client_id,start_seconds,end_seconds\n0,0,soon\n", "line 2: end_seconds is not a number: soon"),
        ("client_id,start_seconds,end_seconds\n4,0,5\n", "line 2: no such client; the fleet's are 0 to 3: 4"),
        ("client_id,start_seconds,end_seconds\n0.5,0,5\n", "line 2: no such client"),
        ("device,start_seconds,end_seconds\njetson-nanoo,0,5\n", "line 2: no such device in the fleet; it has jetson-nano"),
        ("client_id,start_seconds,end_seconds\n1,0,5\n0,0,9\n1,4,6\n", "line 4: overlaps with line 2 for client 1"),
        ("client_id,start_seconds,end_seconds\n", "holds no interval"),
        ("", "cannot be read: No columns to parse"),
    ],
)  # fmt: skip
def test_a_broken_trace_is_refused_with_its_line(text: str, rule: str, tmp_path: Path):
    with pytest.raises(UserError, match=rule) as raised:
        from_trace(tmp_path, text)
    assert raised.value.field == "fleet.availability.path"


def test_a_missing_trace_names_the_nearest_file(tmp_path: Path):
    trace(tmp_path, "x")
    spec = tiny.spec({"fleet.availability": {"kind": "trace", "path": str(tmp_path / "trce.csv")}})
    with pytest.raises(UserError, match=r"no such file .did you mean .*trace\.csv"):
        runs.problem(spec)
    with pytest.raises(UserError, match="not a known format"):
        read_trace(trace(tmp_path, "x", suffix=".txt"), device_names=[], device_index=np.zeros(0))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"kind": "trace"}, "path: is needed for kind=trace"),
        ({"kind": "markov", "path": "x.csv"}, "goes with kind=trace, not markov"),
        ({"kind": "bernoulli", "probability": 0.0}, "greater than 0"),
        ({"kind": "markov", "mean_on_seconds": 0.0}, "greater than or equal to 1"),
        ({"kind": "sometimes"}, "'always', 'bernoulli', 'markov' or 'trace'"),
    ],
)
def test_a_wrong_availability_is_refused(fields: dict[str, Any], rule: str):
    with pytest.raises(UserError, match=rule):
        tiny.spec({"fleet.availability": fields})


def test_where_nobody_is_there_the_server_waits_for_the_first(tmp_path: Path):
    """Nobody from 0 to 8, client 3 from 8, client 1 from 20; client 3 holds no examples, so 20 it is. Then nobody comes."""
    read = from_trace(tmp_path, "client_id,start_seconds,end_seconds\n3,8,50\n1,20,30\n")
    free = np.zeros(6)
    opening = open_round(read, np.array([0, 1, 2]), free, round_idx=0, sim_seconds=2.0)
    assert (opening.available.tolist(), opening.start_seconds) == ([1], 20.0)
    opening = open_round(read, np.array([0, 1, 2]), free, round_idx=1, sim_seconds=40.0)
    assert (opening.available.tolist(), opening.start_seconds) == ([], 40.0)
    assert sample_clients(opening.available, 3, run_seed=0, round_idx=1).tolist() == []


def test_who_is_still_at_work_is_waited_for_like_who_is_away(tmp_path: Path):
    """Client 0 is there until 30 and at work until 9; client 1 comes at 5 and is at work until 7; client 2 comes at 8."""
    read = from_trace(tmp_path, "client_id,start_seconds,end_seconds\n0,0,30\n1,5,6\n1,20,40\n2,8,50\n")

    def opened(ids: list[int], busy: list[float], at: float) -> tuple[list[int], float]:
        found = open_round(read, np.array(ids), np.array(busy), round_idx=0, sim_seconds=at)
        return found.available.tolist(), found.start_seconds

    assert opened([0, 1, 2], [9, 7, 0], 2.0) == ([2], 8.0)
    assert opened([0, 1], [9, 7], 2.0) == ([0], 9.0)
    assert opened([1], [9, 7], 2.0) == ([1], 20.0), "done at 7, when it is away"
    assert opened([0], [35, 7], 2.0) == ([], 2.0), "away for good before it is done"
    always = build_fleet(FleetConfig(num_clients=2), 0).availability
    found = open_round(always, np.arange(2), np.array([4.0, 3.0]), round_idx=0, sim_seconds=3.0)
    assert (found.available.tolist(), found.start_seconds) == ([1], 3.0), "done at the very moment"


def test_with_too_few_the_round_goes_on_with_those_there_are():
    """Six clients, each there with probability 0.15, five wanted: fewer come, sometimes none, and every round is recorded."""
    there = {"kind": "bernoulli", "probability": 0.15}
    done = runs.run(
        tiny.spec({**FAST, "fleet.availability": there, "rounds.num_rounds": 6, "rounds.clients_per_round": 5})
    )
    available = build_fleet(FleetConfig(num_clients=6, availability=AvailabilityConfig(**there)), 0).availability
    expected = [int(available.at(round_idx, 0.0)[done.problem.eligible].sum()) for round_idx in range(6)]
    assert done.rounds["num_available"].tolist() == expected
    assert done.rounds["num_clients"].tolist() == [min(5, count) for count in expected]
    assert 0 in expected
    assert max(expected) > 1
    empty = done.rounds[done.rounds["num_clients"] == 0]
    assert empty["train_loss"].isna().all()
    assert (done.rounds["sim_seconds"].diff()[empty.index[empty.index > 0]] == 0).all()


def test_waiting_passes_on_the_virtual_clock(tmp_path: Path):
    """Nobody before 100 s: the first round begins there, and its end is 100 s and the slowest turn."""
    text = "client_id,start_seconds,end_seconds\n" + "".join(f"{c},100,1e9\n" for c in range(6))
    done = runs.run(tiny.spec({**FAST, "fleet.availability": {"kind": "trace", "path": trace(tmp_path, text)}}))
    assert done.rounds["waited_seconds"].tolist() == [100.0, 0.0, 0.0]
    slowest = done.clients.groupby("round")["sim_seconds"].max()
    np.testing.assert_allclose(done.rounds["sim_seconds"], 100.0 + slowest.cumsum())


def test_a_client_that_goes_away_in_its_turn_leaves_the_round(tmp_path: Path):
    """Nanos are there for the first second alone, which is the middle of their turn: what they did until then is theirs."""
    text = "device,start_seconds,end_seconds\njetson-nano,0,1\njetson-agx-orin-64gb,0,1e9\n"
    there = {"kind": "trace", "path": trace(tmp_path, text)}
    slow = {
        "fleet.network": {"fedadapter": 1.0},
        "local.steps": 20,
        "rounds.num_rounds": 1,
        "rounds.clients_per_round": 6,
    }
    plain = runs.run(tiny.spec({**FAST, **slow})).clients
    left = runs.run(tiny.spec({**FAST, **slow, "fleet.availability": there})).clients
    nano = left["device"] == "jetson-nano"
    assert plain["sim_seconds"][nano].min() > 1.0 > (plain["downlink_seconds"] + 0.01)[nano].max()
    assert (left["status"][nano] == "dropped").all()
    assert (left["status"][~nano] == "ok").all()
    assert (left["sim_seconds"][nano] == 1.0).all()
    assert (left["uplink_bytes"][nano] == 0).all()
    assert (left["downlink_bytes"] == plain["downlink_bytes"]).all()
    np.testing.assert_allclose(left["compute_seconds"][nano], 1.0 - left["downlink_seconds"][nano])
    done = left["compute_seconds"] / plain["compute_seconds"]
    np.testing.assert_allclose(left["flops"], done * plain["flops"])
    np.testing.assert_allclose(
        left["energy_joules"] / plain["energy_joules"], left["sim_seconds"] / plain["sim_seconds"]
    )


@pytest.mark.parametrize("kind", ["bernoulli", "markov"])
def test_a_stopped_run_meets_the_same_clients(kind: str, tmp_path: Path):
    there = {"kind": kind, "probability": 0.25, "mean_on_seconds": 1.0, "mean_off_seconds": 1.0}
    spec = tiny.spec({**FAST, "fleet.availability": there, "rounds.num_rounds": 5, "fleet.network": "3g"})
    runs.run(spec, folder=tmp_path, stop_after=2)
    whole = runs.run(spec)
    runs.same_runs(runs.run(spec, folder=tmp_path), whole)
    assert whole.rounds["num_available"].nunique() > 1


def test_a_deadline_and_availability_compose(tmp_path: Path):
    """Who is away at the deadline left before it; who is there and slow is late."""
    text = "device,start_seconds,end_seconds\njetson-nano,0,1e-3\njetson-agx-orin-64gb,0,1e9\n"
    rules = {"fleet.availability": {"kind": "trace", "path": trace(tmp_path, text)}, "rounds.clients_per_round": 6}
    spec = tiny.spec(
        {**FAST, **rules, "rounds.num_rounds": 1, "rounds.close": "deadline", "rounds.deadline_seconds": 2e-3}
    )
    clients = runs.run(spec).clients
    assert clients.groupby("device")["status"].unique().explode().to_dict() == {
        "jetson-agx-orin-64gb": "late",
        "jetson-nano": "dropped",
    }
