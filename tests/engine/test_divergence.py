"""Clients whose numbers are not finite: left out as if they had not been sampled, told once; none goes on with them alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fleetune.engine import divergence
from fleetune.engine.coordinator import Coordinator
from fleetune.engine.execution.executor import SerialExecutor
from fleetune.engine.execution.worker_process import _diverged
from fleetune.engine.round.planner import RoundPlan, RoundPlanner
from fleetune.errors import RunFailed
from fleetune.methods import METHODS
from fleetune.methods.base import Method, Payload, State
from fleetune.methods.fedavg import FedIT
from fleetune.problem import Problem
from fleetune.records.run_directory import RunDirectory
from fleetune.reports import run_report as report
from fleetune.tensors import all_finite, finite_rows
from fleetune.training.plan import ClientTask, CohortUpdate
from fleetune.training.worker import Worker
from support import commands, runs, tiny

# So hot that the second step of a client is not finite. It goes by the client, so that its neighbours in a stack are healthy.
HOT = 1e30
FAST = {"evaluation.generate": False, "local.max_grad_norm": None, "execution.cohort": 3}
ALL = range(6)
Who = Mapping[int, Sequence[int]]
"""Round -> the clients that diverge in it."""


def hot(method: type[Method], who: Who) -> type[Method]:
    """The method, some of whose clients diverge."""

    class Hot(method):  # type: ignore[misc, valid-type]
        def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
            chosen = [
                replace(task, learning_rate=HOT) if task.client_id in who.get(task.address[1], ()) else task
                for task in tasks
            ]
            return super().local_update(worker, payload, chosen)

    return Hot


class Unsampled(RoundPlanner):
    """The schedule of a run in which some clients never count."""

    who: Who

    def round(self, state: State, round_idx: int, *args: Any, **more: Any) -> RoundPlan:
        """The round, with those as failed from the outset."""
        now = super().round(state, round_idx, *args, **more)
        return divergence.fail(now, np.isin(now.client_ids, self.who.get(round_idx, ())))


def problem_with(spec: Any, who: Who) -> Problem:
    plain = runs.problem(spec)
    made = hot(type(plain.method), who)(plain.method.config, plain.method.context)
    return replace(plain, method=made)


def run_hot(spec: Any, who: Who, folder: Path, *, stop_after: int | None = None) -> runs.Finished:
    """A run in which some clients diverge; ``folder`` may hold one that was stopped."""
    place = folder / "runs" / "tiny"
    run_dir = RunDirectory.open(place) if place.exists() else RunDirectory.create(folder, "tiny", spec.to_dict())
    made, events = problem_with(spec, who), []
    stream = Coordinator(made, SerialExecutor(made), run_dir).run()
    for event in stream:
        events.append(event)
        if sum(e["kind"] == "round" for e in events) == stop_after:
            break
    stream.close()  # type: ignore[attr-defined]
    return runs.finished(made, run_dir, events)


def run_without(spec: Any, who: Who, folder: Path) -> runs.Finished:
    """The same run, in which they were not worked with."""
    plain = runs.problem(spec)
    run_dir = RunDirectory.create(folder, "tiny", spec.to_dict())
    coordinator = Coordinator(plain, SerialExecutor(plain), run_dir)
    coordinator.planner = Unsampled(plain)
    coordinator.planner.who = who
    return runs.finished(plain, run_dir, list(coordinator.run()))


def sampled(round_idx: int) -> list[int]:
    """Who works in a round of the tiny world."""
    clients = runs.run(tiny.spec({**FAST, "evaluation.every": 9})).clients
    return clients["client_id"][clients["round"] == round_idx + 1].tolist()


# The adapter of rank 2 weighs 15,872 bytes each way, so that the nanos train one of rank 1.
RANKS = {"fleet.adapt": "rank", "fleet.budgets": {"bytes_per_round": {"jetson-nano": 20_000}}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "fedavg, one by one": ("fedavg", {"model.lora.dropout": 0.1}),
    "fedavg, ranks of their own": ("fedavg", RANKS),
    "fedprox": ("fedprox", {}),
    "fedsa-lora": ("fedsa-lora", {}),
    "devft": ("devft", {}),
    "devft+fedsa-lora": ("devft", {"method.aggregation": "fedsa-lora"}),
    "sl": ("sl", {}),
    "sl isolated": ("sl", {"method.isolated": True}),
    "split-lora concatenated": ("split-lora", {"method.server": "concatenated"}),
    "split-lora in_turn": ("split-lora", {"method.server": "in_turn"}),
    "split-lora per_client": ("split-lora", {"method.server": "per_client"}),
    "first_k": ("fedsa-lora", {"rounds.close": "first_k", "rounds.first_k": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_round_with_a_diverged_client_is_the_round_without_it(case: str, tmp_path: Path):
    """The last of round 1, and of round 2: state, what clients keep and the records are those of a run that left it out."""
    method, settings = CASES[case]
    spec = tiny.spec({**FAST, **settings}, method=method)
    plain = runs.run(spec).clients
    ok = plain[plain["status"] == "ok"]
    who = {t: [int(ok["client_id"][ok["round"] == t + 1].max())] for t in (0, 1)}
    done, without = run_hot(spec, who, tmp_path / "a"), run_without(spec, who, tmp_path / "b")
    assert all_finite(done.state.tensors.values())
    assert done.rounds["num_failed"].tolist() == [1, 1, 0]
    failed = done.clients["status"] == "failed"
    assert done.clients["failure"].where(failed, "none").unique().tolist() in (
        ["none", "diverged"],
        ["diverged", "none"],
    )
    hidden = {"train_loss": None}  # of the failed client itself: it may be finite
    for one in (done, without):
        runs.same_tensors(done.state.tensors, one.state.tensors)
        assert done.private.keys() == one.private.keys()
        for client, kept in done.private.items():
            runs.same_tensors(kept, one.private[client])
        assert done.rounds.equals(one.rounds)
        assert done.clients.assign(**hidden).equals(one.clients.assign(**hidden))


def test_a_failed_turn_is_paid_for(tmp_path: Path):
    """The server sees only what arrives: bytes, joules and seconds are those of any other turn."""
    spec, who = tiny.spec({**FAST, "rounds.num_rounds": 1}), {0: sampled(0)[-1:]}
    done, plain = run_hot(spec, who, tmp_path), runs.run(spec)
    spent = ["uplink_bytes", "downlink_bytes", "energy_joules", "sim_seconds", "flops", "num_examples", "num_tokens"]
    assert (done.clients["status"] == "failed").sum() == 1
    assert done.clients[spent].equals(plain.clients[spent])
    assert done.rounds["sim_seconds"].equals(plain.rounds["sim_seconds"])


@pytest.mark.parametrize("cohort", [1, 2, 3])
def test_neighbours_in_a_stack_do_not_matter(cohort: int, tmp_path: Path):
    spec, who = tiny.spec({**FAST, "execution.cohort": cohort}), {0: sampled(0)[:1], 1: sampled(1)[1:]}
    done = run_hot(spec, who, tmp_path / "a")
    assert done.rounds["num_failed"].tolist() == [1, 2, 0]
    alone = run_hot(tiny.spec({**FAST, "execution.cohort": 1}), who, tmp_path / "b")
    runs.close_tensors(done.state.tensors, alone.state.tensors, rtol=1e-3, atol=1e-5)


def test_a_stopped_run_meets_the_same_divergence(tmp_path: Path):
    spec, who = tiny.spec(FAST, method="fedsa-lora"), {0: sampled(0)[:1], 1: sampled(1)[-1:], 2: sampled(2)[:1]}
    run_hot(spec, who, tmp_path / "a", stop_after=1)
    runs.same_runs(run_hot(spec, who, tmp_path / "a"), run_hot(spec, who, tmp_path / "b"))


def test_a_diverged_client_keeps_what_it_had(tmp_path: Path):
    """Everybody works in both rounds; client 2 diverges in the second, and its B is that of the first."""
    more = {"rounds.clients_per_round": 6, "rounds.num_rounds": 2}
    done = run_hot(tiny.spec({**FAST, **more}, method="fedsa-lora"), {1: [2]}, tmp_path)
    before = runs.run(tiny.spec({**FAST, **more, "rounds.num_rounds": 1}, method="fedsa-lora"))
    runs.same_tensors(done.private[2], before.private[2])
    assert not torch.equal(*(r.private[1]["layers.0.self_attn.q_proj.lora_B"] for r in (done, before)))
    assert all_finite(done.deployed.adapter.values())


def test_a_late_client_that_diverges_keeps_nothing_and_costs_no_second_pass(tmp_path: Path):
    rules = {"rounds.close": "first_k", "rounds.first_k": 2, "rounds.num_rounds": 1}
    spec = tiny.spec({**FAST, **rules}, method="fedsa-lora")
    plain = runs.run(spec)
    late = plain.clients["client_id"][plain.clients["status"] == "late"].tolist()
    done = run_hot(spec, {0: late}, tmp_path)
    assert sorted(done.clients["status"]) == ["failed", "ok", "ok"]
    assert sorted(done.private) == sorted(set(plain.private) - set(late))
    runs.same_tensors(done.state.tensors, plain.state.tensors)


def test_a_round_without_any_good_client_leaves_the_state_as_it_is(tmp_path: Path):
    """All of round 2 diverge: round 3 starts from the state of round 1, and the run is finished."""
    done = run_hot(tiny.spec({**FAST, "evaluation.every": 1}), {1: list(ALL)}, tmp_path)
    assert done.rounds["num_ok"].tolist() == [3, 0, 3]
    assert done.rounds["num_failed"].tolist() == [0, 3, 0]
    assert done.rounds["train_loss"].isna().tolist() == [False, True, False]
    assert done.rounds["eval_loss"].iloc[0] == done.rounds["eval_loss"].iloc[1]
    assert done.events[-1]["kind"] == "end"
    assert done.events[-1]["totals"]["num_failed"] == 3


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 9])
def test_a_run_of_clients_that_all_diverge_fails(num_rounds: int, tmp_path: Path):
    """After three rounds in a row, or at its end; its rounds are on record, its state is the first; a resume says so again."""
    spec, who = tiny.spec({**FAST, "rounds.num_rounds": num_rounds}), dict.fromkeys(range(9), ALL)
    for _ in range(2):
        with pytest.raises(RunFailed, match="every client that worked diverged") as failed:
            run_hot(spec, who, tmp_path)
        run_dir = RunDirectory.open(tmp_path / "runs" / "tiny")
        assert run_dir.rounds()["num_failed"].tolist() == [3] * min(num_rounds, 3)
        assert failed.value.round_idx == min(num_rounds, 3) - 1
        assert not (run_dir.path / "adapter").exists()
    made = problem_with(spec, who)
    runs.same_tensors(runs.finished(made, run_dir, []).state.tensors, made.method.start().tensors)


def test_the_last_good_adapter_of_a_run_that_fails_is_kept(tmp_path: Path):
    """Round 1 is good, 2 to 4 are not: the adapter is that of a run of one round."""
    spec = tiny.spec({**FAST, "rounds.num_rounds": 9})
    with pytest.raises(RunFailed, match=r"^round 4: .* in 3 rounds in a row.*the last good adapter is kept"):
        run_hot(spec, dict.fromkeys(range(1, 9), ALL), tmp_path)
    short = runs.run(tiny.spec({**FAST, "rounds.num_rounds": 1}))
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "runs" / "tiny" / name).read_bytes() == (short.run_dir.path / name).read_bytes()


class Overflows(FedIT):
    """A sum of finite updates that is not finite."""

    def aggregate(self, state: State, updates: Any, round_idx: int) -> State:
        after = super().aggregate(state, updates, round_idx)
        return State({n: t * (math.inf if round_idx == 1 else 1.0) for n, t in after.tensors.items()}, after.values)


def test_a_state_that_is_not_finite_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "fedit", Overflows)
    done = runs.run(tiny.spec(FAST))
    assert done.rounds["num_failed"].tolist() == [0, 3, 0]
    assert all_finite(done.state.tensors.values())


def update_of(**fields: Any) -> CohortUpdate:
    return CohortUpdate(upload=None, losses=np.ones(3), num_tokens=np.ones(3, int), **fields)


def test_who_is_to_blame_where_clients_share_a_server():
    """The first whose loss was not finite; all where that cannot be told. Without a shared half each stands for itself."""
    losses = np.array([np.nan, np.inf, np.nan])
    shared = replace(update_of(diverged_at=np.array([3.0, 2.0, 3.0])), losses=losses)
    assert _diverged(shared, coupled=True).tolist() == [False, True, False]
    assert _diverged(shared, coupled=False).tolist() == [True] * 3
    broken = update_of(server={"x": torch.tensor([math.nan])}, diverged_at=np.full(3, np.inf))
    assert _diverged(broken, coupled=True).tolist() == [True] * 3
    assert _diverged(update_of(server={"x": torch.ones(2)}), coupled=True).tolist() == [False] * 3


def test_rows_that_are_finite_are_found_also_where_their_sum_is_not():
    rows = torch.ones(5, 4)
    rows[1, 2], rows[2, 0], rows[3] = math.nan, -math.inf, 3e38
    rows[4, :2] = torch.tensor([math.inf, -math.inf])
    assert finite_rows(rows).tolist() == [True, False, False, True, False]
    assert finite_rows(torch.ones(2, 0)).tolist() == [True, True]


# -- what a person sees ---------------------------------------------------------------------------------------------------
def test_a_command_s_run_of_diverging_clients_ends_with_status_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """One sentence, told once; records, report and a second try tell the same."""
    job = commands.job_file(
        tmp_path, {"local.learning_rate": 1e6, "local.weight_decay": 1e6, "local.steps": 6, "rounds.num_rounds": 5}
    )
    out = commands.fleetune(capfd, monkeypatch, "run", job, "--workspace", tmp_path)
    assert out.status == 1
    assert out.stderr.count("clients diverged (loss or update not finite)") == 1
    assert out.stderr.count("every client that worked diverged") == 1
    assert "Traceback" not in out.stderr
    (place,) = (tmp_path / "runs").iterdir()
    run = RunDirectory.open(place)
    assert (run.result() or {})["status"] == "failed"
    assert set(run.clients()["status"]) == {"failed"}
    assert run.rounds()["num_failed"].tolist() == [3, 3, 3]
    again = commands.fleetune(capfd, monkeypatch, "resume", place)
    assert (again.status, len(run.rounds())) == (1, 3)
    assert "in 3 rounds in a row" in again.stderr
    assert report.report([place], tmp_path / "report").is_file()


def test_divergence_is_told_once_and_not_again_after_a_resume(tmp_path: Path):
    spec, who = tiny.spec(FAST), {0: sampled(0)[:1], 1: sampled(1)[:2]}
    first = run_hot(spec, who, tmp_path, stop_after=1).events
    rest = run_hot(spec, who, tmp_path).events
    told = [list(text) for events in (first, rest) for text in [map_notices(events)]]
    assert [len(texts) for texts in told] == [1, 0]
    assert told[0][0].startswith("round 1: 1 of 3 clients diverged")


def map_notices(events: Sequence[dict[str, Any]]) -> list[str]:
    notices = divergence.Notices()
    return [text for event in events for text in notices.of(event)]


def test_an_evaluation_that_is_not_finite_is_on_record_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not as one that did not take place: NaN in the table, named in result.json, told once."""
    from fleetune.engine import pending_rounds as ledger
    from fleetune.engine.launch.run import finish

    monkeypatch.setattr(ledger, "totals", lambda parts: {"eval_loss": math.nan})
    done = runs.run(tiny.spec({**FAST, "rounds.num_rounds": 4, "evaluation.every": 2}))
    column = pq.read_table(done.run_dir.path / "rounds.parquet")["eval_loss"].to_pylist()
    assert [column[0], column[2]] == [None, None]
    assert math.isnan(column[1])
    assert math.isnan(column[3])
    assert len(map_notices(done.events)) == 1
    finish(done.run_dir, done.events[-1])
    text = (done.run_dir.path / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["not_finite"] == ["eval_loss", "baseline_eval_loss"]
