"""Split learning: a chain of clients, in what they learn and on the virtual clock."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fleetune.errors import UserError
from fleetune.methods.sl import SL
from fleetune.methods.split import drawn_order
from fleetune.records.timeline import write_timeline
from fleetune.training.plan import CohortUpdate
from support import runs, tiny

SGD = {"evaluation.generate": False, "local.optimizer": "sgd", "local.learning_rate": 0.5}
ALL = {"fleet.num_clients": 3, "rounds.clients_per_round": 3}
ISOLATED = {"method.isolated": True}


def test_the_next_client_starts_where_the_last_one_ended():
    """Three clients in a chain are three calls with one client each, each from the halves of the one before, bit for bit."""
    done, passed = runs.recorded(tiny.spec({**SGD, "rounds.num_rounds": 1}, method="sl"))
    (one,) = passed
    (cohort,) = one.unit.cohorts
    method, payload, tasks = done.problem.method, one.payloads[cohort.payload], one.unit.tasks(cohort)
    assert isinstance(method, SL)
    worker = runs.worker(done.problem)
    for place in method.turns(np.array([task.client_id for task in tasks]), 0):
        update = method.local_update(worker, payload, [tasks[place]])
        assert update.upload is not None
        payload = replace(payload, tensors=update.upload.client(0), server={**payload.server, **update.server})
    runs.same_tensors(done.state.tensors, {**payload.tensors, **payload.server})


def test_a_round_lasts_as_long_as_all_turns_together():
    """Each client waits for those before it in the drawn order, and the round ends with the last one."""
    done = runs.run(tiny.spec(SGD, method="sl"))
    for round_idx, rows in done.clients.groupby("round"):
        order = drawn_order(done.problem.spec.seed, int(round_idx) - 1, rows["client_id"].tolist())
        turns = rows["sim_seconds"].to_numpy()[order]
        np.testing.assert_allclose(rows["waiting_seconds"].to_numpy()[order], np.cumsum(turns) - turns)
    lasts = np.diff(done.rounds["sim_seconds"], prepend=0.0)
    np.testing.assert_allclose(lasts, done.clients.groupby("round")["sim_seconds"].sum())
    drawn = json.loads(write_timeline(done.run_dir).read_text())["traceEvents"]
    halves = [event["ts"] + event["dur"] for event in drawn if event["name"] == "its half"]
    starts = np.cumsum(lasts) - lasts
    called = starts + done.clients.groupby("round")["waiting_seconds"].max()  # the last one's turn
    assert len(halves) == 3
    assert (np.array(halves) > 1e6 * called).all()
    side_by_side = runs.run(tiny.spec(SGD, method="sfl"))
    assert not side_by_side.clients["waiting_seconds"].any()
    assert side_by_side.rounds["sim_seconds"].iloc[-1] < done.rounds["sim_seconds"].iloc[-1]


def test_who_comes_after_the_deadline_is_the_end_of_the_chain():
    """With a deadline after the second turn of three the third client is late, and the round is closed at the deadline."""
    plain = runs.run(tiny.spec({**SGD, "rounds.num_rounds": 1}, method="sl"))
    by_turn = plain.clients.sort_values("waiting_seconds")
    third = by_turn["waiting_seconds"].iloc[2]
    close = {"rounds.num_rounds": 1, "rounds.close": "deadline", "rounds.deadline_seconds": float(third) * 1.01}
    done = runs.run(tiny.spec({**SGD, **close}, method="sl"))
    status = done.clients.set_index("client_id")["status"]
    assert status[by_turn["client_id"]].tolist() == ["ok", "ok", "late"]
    assert done.rounds["sim_seconds"].iloc[0] == close["rounds.deadline_seconds"]


@pytest.mark.parametrize("isolated", [False, True])
def test_nobody_begins_a_turn_after_the_close(isolated: bool):
    """The round closes with the first client of three. The others come too late, but were never called.

    So they receive, do, spend and keep nothing, and are free for the next round.
    """
    close = {"rounds.num_rounds": 2, "rounds.close": "first_k", "rounds.first_k": 1, "method.isolated": isolated}
    done = runs.run(tiny.spec({**SGD, **ALL, **close}, method="sl"))
    late = done.clients[done.clients["status"] == "late"]
    assert len(late) == 4
    for name in ("flops", "uplink_bytes", "downlink_bytes", "sim_seconds", "energy_joules", "num_tokens"):
        assert not late[name].any(), name
    assert done.rounds["num_available"].tolist() == [3, 3]
    first = done.clients[done.clients["status"] == "ok"]
    np.testing.assert_allclose(np.diff(done.rounds["sim_seconds"], prepend=0.0), first["sim_seconds"])
    assert set(done.private) == (set(first["client_id"]) if isolated else set())


def test_a_late_client_in_the_midst_of_its_turn_keeps_its_half_alone():
    """Isolated, closed in the second of three turns: that client's half is its own, and the server's is the first client's."""
    one_round = {**SGD, **ALL, **ISOLATED, "rounds.num_rounds": 1}
    by_turn = runs.run(tiny.spec(one_round, method="sl")).clients.sort_values("waiting_seconds")
    close = {"rounds.close": "deadline", "rounds.deadline_seconds": float(by_turn["waiting_seconds"].iloc[1]) * 1.01}
    done, passed = runs.recorded(tiny.spec({**one_round, **close}, method="sl"))
    first, second, _ = by_turn["client_id"]
    assert done.clients.set_index("client_id")["status"][by_turn["client_id"]].tolist() == ["ok", "late", "late"]
    assert set(done.private) == {first, second}
    (one,) = passed
    (cohort,) = one.unit.cohorts
    tasks = {task.client_id: task for task in one.unit.tasks(cohort)}
    method, worker = done.problem.method, runs.worker(done.problem)
    alone = method.local_update(worker, one.payloads[cohort.payload], [tasks[first]])
    runs.same_tensors(
        {n: done.state.tensors[n] for n in alone.server if n in done.state.tensors},
        {n: t for n, t in alone.server.items() if n in done.state.tensors},
    )


def test_who_hands_on_what_is_not_finite_is_to_blame(monkeypatch: pytest.MonkeyPatch):
    """The first client's loss is finite, but the half that it hands on is not: it has diverged, and not the one that gets it."""
    done, passed = runs.recorded(tiny.spec({**SGD, "rounds.num_rounds": 1}, method="sl"))
    (one,) = passed
    (cohort,) = one.unit.cohorts
    method, tasks = done.problem.method, one.unit.tasks(cohort)
    order = method.turns(np.array([task.client_id for task in tasks]), 0)

    class Overflows(method.Round):  # type: ignore[name-defined, misc]
        def result(self) -> CohortUpdate:
            update = super().result()
            if self.tasks[0].client_id == tasks[order[0]].client_id:
                update.upload.data[0, 0] = np.inf
            return update

    monkeypatch.setattr(method, "Round", Overflows)
    update = method.local_update(runs.worker(done.problem), one.payloads[cohort.payload], tasks)
    assert update.diverged_at is not None
    assert np.isfinite(update.losses[order[0]])
    assert not np.isfinite(update.losses[order[1]])
    assert update.diverged_at.argmin() == order[0]
    assert (update.diverged_at == update.diverged_at.min()).sum() == 1


def test_isolated_clients_are_evaluated_with_their_own_halves():
    """Each on the examples that it holds out, in its own model, whatever the run's quality is that of."""
    found = []
    for evaluates in ("average", "clients"):
        settings = {**SGD, **ALL, **ISOLATED, "rounds.num_rounds": 1, "method.evaluates": evaluates}
        done = runs.run(tiny.spec({**settings, "data.held_out": 0.2, "evaluation.personal": "last"}, method="sl"))
        found.append(done.rounds["eval_personal_loss"].iloc[-1])
    assert found[0] == found[1]
    common = runs.run(
        tiny.spec(
            {**SGD, **ALL, "rounds.num_rounds": 1, "data.held_out": 0.2, "evaluation.personal": "last"}, method="sl"
        )
    )
    assert found[0] != common.rounds["eval_personal_loss"].iloc[-1]


def test_the_plan_adds_up_turns_too():
    from fleetune.plan.walk import plan

    spec = tiny.spec(SGD, method="sl")
    done = runs.run(spec)
    planned = [row["sim_seconds"] for row in plan(spec).rounds]
    np.testing.assert_allclose(planned, done.rounds["sim_seconds"])


def test_the_order_of_turns_is_the_clients_own():
    """Who else takes part, and how they are arranged, does not decide who comes first."""
    ids = [7, 2, 9, 4]
    ranked = [ids[place] for place in drawn_order(0, 5, ids)]
    fewer = [4, 7, 2]
    assert [fewer[place] for place in drawn_order(0, 5, fewer)] == [client for client in ranked if client != 9]


def test_isolated_halves_stay_and_the_servers_goes_on():
    """Nothing of a client's half is sent after the first time; the shared model takes their mean, by numbers of examples."""
    done = runs.run(tiny.spec({**SGD, **ALL, **ISOLATED, "rounds.num_rounds": 2}, method="sl"))
    assert isinstance(done.problem.method, SL)
    on_client = done.problem.method.on_client
    fresh = done.problem.method.context.fresh_adapter()
    for name in filter(on_client, fresh):
        assert torch.equal(done.state.tensors[name], fresh[name])
    sizes = done.clients.set_index("client_id")["shard_examples"].loc[lambda s: ~s.index.duplicated()]
    shipped = done.deployed.adapter
    for name in filter(on_client, fresh):
        mean = sum(done.private[c][name] * (n / sizes.sum()) for c, n in sizes.items())
        torch.testing.assert_close(shipped[name], mean)
    name = next(name for name in fresh if on_client(name) and name.endswith("lora_B"))
    assert len({done.private[c][name].numpy().tobytes() for c in sizes.index}) == 3


def test_isolated_clients_can_be_evaluated_each():
    settings = {**SGD, **ALL, **ISOLATED, "method.evaluates": "clients", "rounds.num_rounds": 1}
    done = runs.run(tiny.spec(settings, method="sl"))
    losses = [done.rounds[f"eval_loss/client-{client}"].iloc[-1] for client in range(3)]
    assert len(set(losses)) == 3
    np.testing.assert_allclose(done.rounds["eval_loss"].iloc[-1], np.mean(losses))


def test_only_isolated_clients_have_models_of_their_own():
    with pytest.raises(UserError, match="one half that is handed on"):
        tiny.spec({"method.evaluates": "clients"}, method="sl")
