"""The round loop: groups, statuses, private state, errors, and what is written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fleetune.engine.coordinator import Coordinator
from fleetune.engine.execution.executor import CompletedEvaluation, SerialExecutor
from fleetune.errors import RunFailed
from fleetune.methods.base import ClientInfo, GlobalModel, Payload, State, Update
from fleetune.methods.fedavg import FedIT
from fleetune.methods.traits import Traits
from fleetune.records.run_directory import RunDirectory
from fleetune.training.evaluate import EvalSums, totals
from fleetune.training.plan import ClientTask, CohortUpdate
from fleetune.training.worker import Worker
from support import runs, tiny

FAST = {"evaluation.generate": False}
LATE = {"rounds.close": "deadline", "rounds.deadline_seconds": 1e-3}  # everybody is


def run_with(method: type[FedIT], folder: Path, **overrides: Any) -> tuple[runs.Finished, FedIT]:
    """A run of the tiny world under a method of the test's own."""
    spec = tiny.spec({**FAST, **overrides})
    plain = runs.problem(spec)
    made = replace(plain, method=method(plain.method.config, plain.method.context))
    run_dir = RunDirectory.create(folder, "own", spec.to_dict())
    events = list(Coordinator(made, SerialExecutor(made), run_dir).run())
    assert isinstance(made.method, FedIT)
    return runs.finished(made, run_dir, events), made.method


class ByDevice(FedIT):
    """Boards with little memory train with another payload: the same adapter, halved."""

    def __init__(self, config: Any, context: Any):
        super().__init__(config, context)
        self.traits = Traits(groups=True)

    def group(self, client: ClientInfo) -> bool:
        return client.device == "jetson-nano"

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        scale = 0.5 if group else 1.0
        return Payload({n: scale * t for n, t in state.tensors.items()}, {"small": group})


class EachUpdate(FedIT):
    """Wants every client's update by itself."""

    def __init__(self, config: Any, context: Any):
        super().__init__(config, context)
        self.traits = Traits(partial_sums=False)

    seen: list[tuple[tuple[int, ...], float]]

    def aggregate(self, state: State, updates: Any, round_idx: int) -> State:
        self.seen = []

        def noted() -> Any:
            for update in updates:
                self.seen.append((update.client_ids, update.weight))
                yield update

        return super().aggregate(state, noted(), round_idx)


class Deaf(FedIT):
    """Looks at no update."""

    def aggregate(self, state: State, updates: Any, round_idx: int) -> State:
        return state


class Fails(FedIT):
    """The local update raises: ``times`` times, or always for ``client``."""

    times = 0
    client = -1

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        if self.times > 0:
            self.times -= 1
            raise RuntimeError("a board fell off the table")
        if any(task.client_id == self.client for task in tasks):
            raise ZeroDivisionError("no tokens")
        return super().local_update(worker, payload, tasks)


def test_each_group_gets_its_own_payload(tmp_path: Path):
    """With learning rate 0 an upload is the payload: the mean lies between half and all, by the nanos' examples."""
    done, method = run_with(ByDevice, tmp_path, **{"local.learning_rate": 0.0, "rounds.num_rounds": 1})
    clients = done.clients
    nano = clients["device"] == "jetson-nano"
    assert 0 < nano.sum() < len(clients)
    fraction = clients["shard_examples"][nano].sum() / clients["shard_examples"].sum()
    name = "layers.0.self_attn.q_proj.lora_A"
    expected = method.context.fresh_adapter()[name] * (1 - fraction / 2)
    torch.testing.assert_close(done.state.tensors[name], expected)


def test_a_method_may_ask_for_every_update(tmp_path: Path):
    """Each client comes once with p_k = n_k / sum n, and the result is that of partial sums."""
    done, method = run_with(EachUpdate, tmp_path)
    assert isinstance(method, EachUpdate)
    last = done.clients[done.clients["round"] == 3]
    weights = dict(zip(last["client_id"], last["shard_examples"] / last["shard_examples"].sum(), strict=True))
    assert sorted(ids for ids, _ in method.seen) == [(c,) for c in sorted(weights)]
    assert all(weight == pytest.approx(weights[ids[0]]) for ids, weight in method.seen)
    plain = runs.run(tiny.spec(FAST))
    runs.close_tensors(done.state.tensors, plain.state.tensors, rtol=1e-4, atol=1e-6)


def test_updates_that_nobody_reads_are_recorded_all_the_same(tmp_path: Path):
    done, _ = run_with(Deaf, tmp_path)
    assert np.isfinite(done.clients["train_loss"]).all()
    assert len(done.clients) == 9


def test_a_failure_that_passes_is_retried_without_a_trace(tmp_path: Path):
    """The first call raises once; the run is the one without it."""

    class FailsOnce(Fails):
        times = 1

    done, _ = run_with(FailsOnce, tmp_path)
    runs.same_tensors(done.state.tensors, runs.run(tiny.spec(FAST)).state.tensors)


def test_a_failure_that_stays_names_its_client_and_leaves_the_rounds_before_it(tmp_path: Path):
    """A client that is sampled first in round 2 or 3 always fails; the rounds before it are on record."""
    clients = runs.run(tiny.spec(FAST)).clients
    first = clients.groupby("client_id")["round"].min()
    guilty = int(first[first > 1].index[0])

    class FailsForOne(Fails):
        client = guilty

    with pytest.raises(RunFailed, match=f"client {guilty}, round {first[guilty]}, stage 0: ZeroDivisionError"):
        run_with(FailsForOne, tmp_path)
    run_dir = RunDirectory.open(tmp_path / "runs" / "own")
    assert run_dir.rounds()["round"].tolist() == list(range(1, first[guilty]))


def test_clients_that_drop_out_are_sent_to_but_do_not_answer():
    """Half of the clients leave: they were sent the payload and computed, but no byte of theirs comes up."""
    done = runs.run(tiny.spec({**FAST, "fleet.dropout": 0.5, "rounds.num_rounds": 4, "rounds.clients_per_round": 5}))
    clients = done.clients
    left = clients["status"] == "dropped"
    assert 0 < left.sum() < len(clients)
    assert (clients["downlink_bytes"] > 0).all()
    assert (clients["uplink_bytes"][left] == 0).all()
    assert (clients["uplink_bytes"][~left] > 0).all()
    assert clients["train_loss"].isna().tolist() == left.tolist()
    assert done.rounds["num_dropped"].tolist() == left.groupby(clients["round"]).sum().tolist()
    assert (done.rounds["num_ok"] + done.rounds["num_dropped"] == 5).all()


@pytest.mark.parametrize("close", [{"close": "first_k", "first_k": 1}, {"close": "deadline", "deadline_seconds": 1e-3}])
def test_late_clients_do_not_count(close: dict[str, Any]):
    """Only the first reply counts, or none at all; late clients have spent their bytes and joules."""
    rules = {f"rounds.{name}": value for name, value in close.items()}
    done, passed = runs.recorded(tiny.spec({**FAST, **rules}))
    late = done.clients["status"] == "late"
    num_ok = 1 if close["close"] == "first_k" else 0
    assert (done.rounds["num_late"] == done.rounds["num_clients"] - num_ok).all()
    assert done.rounds["num_late"].iloc[0] == 3 - num_ok
    assert (done.clients["uplink_bytes"][late] > 0).all()
    assert done.clients["train_loss"].isna().tolist() == late.tolist()
    assert sum(len(one.reply.client_ids) for one in passed) == 3 * num_ok


def turns(done: runs.Finished) -> pd.DataFrame:
    """When each turn began and ended on the virtual clock, in the order of rounds."""
    ends = np.r_[0.0, done.rounds["sim_seconds"]]
    starts = ends[:-1] + done.rounds["waited_seconds"]
    began = done.clients["round"].map(dict(zip(done.rounds["round"], starts, strict=True)))
    return done.clients.assign(began=began, ended=began + done.clients["sim_seconds"])


@pytest.mark.parametrize(
    "rules",
    [
        {"rounds.close": "deadline", "rounds.deadline_seconds": 0.2},
        {"rounds.close": "first_k", "rounds.first_k": 1, "fleet.dropout": 0.3},
    ],
    ids=["deadline", "first_k"],
)
@pytest.mark.parametrize("away", [False, True])
def test_a_client_works_on_one_turn_at_a_time(rules: dict[str, Any], away: bool, tmp_path: Path):
    """Turns of one client never overlap; with all of them at work the next round waits; a run that is resumed agrees."""
    there = {"kind": "markov", "mean_on_seconds": 2.0, "mean_off_seconds": 1.0} if away else {"kind": "always"}
    more = {"fleet.network": "3g", "fleet.availability": there, "rounds.num_rounds": 5, "rounds.clients_per_round": 4}
    spec = tiny.spec({**FAST, **rules, **more}, method="fedsa-lora")
    whole = runs.run(spec)
    for _, mine in turns(whole).groupby("client_id"):
        assert (mine["began"].to_numpy()[1:] >= mine["ended"].to_numpy()[:-1]).all()
    assert whole.rounds["num_available"].min() < whole.rounds["num_available"].max()
    runs.run(spec, folder=tmp_path, stop_after=3)
    runs.same_runs(runs.run(spec, folder=tmp_path), whole)


def test_a_round_that_all_miss_is_followed_when_the_first_of_them_is_done():
    """Six clients, all asked, none in time: the second round waits until somebody is back, and asks that one alone."""
    rules = {"rounds.close": "deadline", "rounds.deadline_seconds": 0.2, "rounds.num_rounds": 2}
    done = runs.run(
        tiny.spec({**FAST, **rules, "rounds.clients_per_round": 6, "fleet.network": "3g", "local.steps": 20})
    )
    first, second = (done.clients[done.clients["round"] == t] for t in (1, 2))
    quickest = first["sim_seconds"].min()
    assert quickest > 0.2
    assert done.rounds["waited_seconds"].tolist() == [0.0, pytest.approx(quickest - 0.2)]
    assert second["client_id"].tolist() == first["client_id"][first["sim_seconds"] == quickest].tolist()


@pytest.mark.parametrize("num_late", [1, 3])
def test_what_a_late_client_keeps_is_from_its_late_work(num_late: int):
    """Also where all of them are late, and the server's state stays as it is."""
    rules = {"rounds.close": "first_k", "rounds.first_k": 2} if num_late == 1 else LATE
    done = runs.run(tiny.spec({**FAST, **rules, "rounds.num_rounds": 1}, method="fedsa-lora"))
    assert done.rounds["num_late"].tolist() == [num_late]
    assert sorted(done.private) == done.clients["client_id"].tolist()
    assert all(any(t.any() for t in kept.values()) for kept in done.private.values())
    fresh = done.problem.method.start().tensors
    assert (num_late == 3) == all(torch.equal(done.state.tensors[n], t) for n, t in fresh.items())


def test_the_clock_and_the_totals_add_up():
    done = runs.run(tiny.spec(FAST))
    longest = done.clients.groupby("round")["sim_seconds"].max().cumsum()
    np.testing.assert_allclose(done.rounds["sim_seconds"], longest)
    end = done.events[-1]
    assert end["sim_seconds"] == done.rounds["sim_seconds"].iloc[-1]
    for name in ("uplink_bytes", "downlink_bytes", "energy_joules"):
        assert end["totals"][name] == pytest.approx(done.clients[name].sum())
    weights = done.clients["shard_examples"]
    loss = (done.clients["train_loss"] * weights).groupby(done.clients["round"]).sum()
    np.testing.assert_allclose(done.rounds["train_loss"], loss / weights.groupby(done.clients["round"]).sum())


@pytest.mark.parametrize("rules", [{}, {"local.epochs": 1.0}], ids=["steps", "epochs"])
def test_examples_held_and_examples_trained_on_are_two_columns(rules: dict[str, Any]):
    """2 steps of 2 are 4 examples, a pass is the shard; the weight is the shard either way. A refused client trains on none."""
    budgets = {"memory_bytes": {"jetson-nano": 1000}}
    done = runs.run(tiny.spec({**FAST, **rules, "rounds.num_rounds": 1, "fleet.budgets": budgets}))
    clients = done.clients
    sizes = np.diff(done.problem.partition.offsets)[clients["client_id"]]
    worked = clients["status"] == "ok"
    assert 0 < worked.sum() < len(clients)
    assert clients["shard_examples"].tolist() == sizes.tolist()
    assert clients["num_examples"].tolist() == np.where(worked, sizes if rules else 4, 0).tolist()


def test_evaluation_is_every_so_many_rounds_and_at_the_end():
    done = runs.run(tiny.spec({"rounds.num_rounds": 5, "evaluation.every": 2}))
    assert np.isfinite(done.rounds["eval_loss"]).tolist() == [False, True, False, True, True]
    assert done.rounds["eval_accuracy"].dropna().between(0, 1).all()
    assert set(done.events[0]["baseline"]) == {"eval_loss", "eval_accuracy"}


@pytest.mark.parametrize("stop_after", [None, 1, 2])
def test_a_run_ends_with_the_round_in_which_its_virtual_time_is_over(stop_after: int | None, tmp_path: Path):
    """The rounds of an unlimited run up to the first that ends at or after the limit, and that one is evaluated: of five rounds
    the third, for a limit between the ends of the second and the third; also if the run is stopped and resumed on the way.
    """
    unlimited = runs.run(tiny.spec({"rounds.num_rounds": 5, "evaluation.every": 5}))
    second, third = unlimited.rounds["sim_seconds"].iloc[1:3]
    spec = tiny.spec({"rounds.num_rounds": 5, "evaluation.every": 5, "rounds.max_sim_seconds": (second + third) / 2})
    if stop_after is not None:
        runs.run(spec, folder=tmp_path, stop_after=stop_after)
    done = runs.run(spec, folder=tmp_path)
    compared = ["train_loss", "sim_seconds", "uplink_bytes"]
    pd.testing.assert_frame_equal(done.rounds[compared], unlimited.rounds[compared].iloc[:3])
    assert np.isfinite(done.rounds["eval_loss"]).tolist() == [False, False, True]
    end = done.events[-1]
    assert (end["round"], end["num_rounds"], end["sim_seconds"]) == (3, 3, third)
    assert end["row"]["eval_loss"] == done.rounds["eval_loss"].iloc[-1]
    assert [e["kind"] for e in runs.run(spec, folder=tmp_path).events] == ["start", "end"]


def test_a_limit_that_a_round_just_reaches_is_over():
    """The clock stands at the limit: no further round begins."""
    first = runs.run(tiny.spec({"rounds.num_rounds": 1})).rounds["sim_seconds"].iloc[0]
    assert len(runs.run(tiny.spec({"rounds.num_rounds": 3, "rounds.max_sim_seconds": float(first)})).rounds) == 1


def test_answers_of_the_first_examples_alone():
    """The loss is that of all eight examples, as where all are answered; the accuracy that of the first three, as if there were
    no others, whether they lie in one chunk or not.
    """
    one_round = {"rounds.num_rounds": 1, "evaluation.every": 1}
    everything, three = runs.run(tiny.spec(one_round)), runs.run(tiny.spec({**one_round, "data.num_eval_examples": 3}))
    for batch_size in (8, 2):
        chunks = {"evaluation.num_answers": 3, "evaluation.batch_size": batch_size}
        some = runs.run(tiny.spec({**one_round, **chunks}))
        assert some.rounds["eval_loss"].tolist() == pytest.approx(everything.rounds["eval_loss"].tolist(), rel=1e-5)
        assert some.rounds["eval_accuracy"].tolist() == three.rounds["eval_accuracy"].tolist()
    # Two chunks: two right of three answers, and a chunk without any. Loss (6 + 2) / (4 + 4).
    parts = [EvalSums(6.0, 4, 2, 3), EvalSums(2.0, 4, 0, 0)]
    assert totals(parts) == {"eval_loss": 1.0, "eval_accuracy": pytest.approx(2 / 3)}


class Tardy(SerialExecutor):
    """An evaluation is not there before somebody waits for it."""

    @dataclass
    class Slow:
        inner: CompletedEvaluation
        is_waited_for: bool = False

        def is_done(self) -> bool:
            return self.is_waited_for

        def sums(self) -> list[EvalSums]:
            self.is_waited_for = True
            return self.inner.sums()

    def evaluate(self, model: GlobalModel, chunks: Sequence[np.ndarray]) -> Any:
        return self.Slow(super().evaluate(model, chunks))


def test_a_late_evaluation_changes_nothing_but_when_a_round_is_written():
    """Every round is evaluated: round t is written while t + 2 is worked on, with the same bits; none is left out."""
    spec = tiny.spec({**FAST, "rounds.num_rounds": 4, "evaluation.every": 1}, method="fedsa-lora")
    late, prompt = runs.run(spec, Tardy), runs.run(spec)
    runs.same_runs(late, prompt)
    assert [bool(e["baseline"]) for e in late.events] == [False, False, False, True, True, True]
    assert [e["round"] for e in late.events] == [0, 1, 2, 3, 4, 4]
    for one, other in zip(late.events[1:], prompt.events[1:], strict=True):
        for event in (one, other):
            event["totals"].pop("wall_seconds")
            event.pop("baseline")
            event["row"].pop("wall_seconds")
            event["row"].pop("run_id", None)
        assert one == other


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_that_is_killed_while_an_evaluation_is_under_way_goes_on(stop_after: int, tmp_path: Path):
    """What waited for it is done again, round and evaluation, with what clients kept before that round."""
    spec = tiny.spec({**FAST, "rounds.num_rounds": 4, "evaluation.every": 2}, method="fedsa-lora")
    runs.run(spec, Tardy, folder=tmp_path, stop_after=stop_after)
    assert len(RunDirectory.open(tmp_path / "runs" / "tiny").rounds()) == stop_after
    resumed, whole = runs.run(spec, Tardy, folder=tmp_path), runs.run(spec)
    runs.same_runs(resumed, whole)
    assert resumed.events[-1]["baseline"] == whole.events[-1]["baseline"] != {}


def test_chunks_of_the_evaluation_set_add_up():
    """8 examples in chunks of 8 or of 3: the same loss per token."""
    whole, parts = (runs.run(tiny.spec({**FAST, "evaluation.batch_size": size})) for size in (8, 3))
    np.testing.assert_allclose(whole.rounds["eval_loss"].iloc[-1], parts.rounds["eval_loss"].iloc[-1], rtol=1e-5)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_round_that_was_recorded_but_not_saved_is_done_again(stop_after: int, tmp_path: Path):
    """The kill falls between the records of a round and its checkpoint: resuming gives the uninterrupted run."""
    spec = tiny.spec(FAST, method="fedsa-lora")
    runs.run(spec, folder=tmp_path, stop_after=stop_after)
    place = tmp_path / "runs" / "tiny"
    shutil.copytree(place / "checkpoint", tmp_path / "before")
    runs.run(spec, folder=tmp_path, stop_after=1)
    records = place / "checkpoint" / "records"
    later = {path.name: path.read_bytes() for path in records.iterdir()}
    shutil.rmtree(place / "checkpoint")
    shutil.copytree(tmp_path / "before", place / "checkpoint")
    for name, content in later.items():
        (records / name).write_bytes(content)
    assert len(RunDirectory.open(place).rounds()) == stop_after + 1
    runs.same_runs(runs.run(spec, folder=tmp_path), runs.run(spec))


def test_a_finished_run_that_is_run_again_stays_as_it_is(tmp_path: Path):
    """Nothing is left to do: no round, the same records and adapter."""
    spec = tiny.spec(FAST)
    done = runs.run(spec, folder=tmp_path)
    adapter = (done.run_dir.path / "adapter" / "adapter_model.safetensors").read_bytes()
    again = runs.run(spec, folder=tmp_path)
    assert [e["kind"] for e in again.events] == ["start", "end"]
    runs.same_runs(again, done)
    assert again.events[-1]["row"]["eval_loss"] == done.events[-1]["row"]["eval_loss"]
    assert (done.run_dir.path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_clients_without_examples_are_not_sampled():
    """Dirichlet with a tiny alpha leaves some of 20 clients with nothing; those are never asked."""
    spec = tiny.spec({**FAST, "fleet.num_clients": 20, "data.partition": {"kind": "dirichlet", "alpha": 0.02}})
    problem = runs.problem(spec)
    sizes = np.diff(problem.partition.offsets)
    assert (sizes == 0).any()
    assert (sizes[runs.run(spec).clients["client_id"]] > 0).all()


def test_another_architecture_is_costed_with_its_own_sizes():
    """LLaMA2-7B: rank 2 on 7 linears of 32 blocks, 4096 and 11008 wide, sent in fp32."""
    done = runs.run(tiny.spec({**FAST, "cost.model": "llama2-7b", "cost.weights": "nf4", "cost.precision": "bf16"}))
    ok = done.clients[done.clients["status"] == "ok"]
    elements = 32 * 2 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert ok["uplink_bytes"].unique().tolist() == [4 * elements]
    plain = runs.run(tiny.spec(FAST))
    both = ok.merge(plain.clients, on=["round", "client_id"])
    assert (both["flops_x"] > 1000 * both["flops_y"]).all()


def test_epochs_give_clients_steps_by_their_examples():
    """Two passes over n examples in batches of 4 are 2 ceil(n / 4) steps, 2 n examples and their tokens."""
    more = {"local.epochs": 2.0, "local.batch_size": 4, "rounds.num_rounds": 1}
    done, passed = runs.recorded(tiny.spec({**FAST, **more}))
    part, lengths = done.problem.partition, done.problem.inputs.train.lengths
    tokens = done.clients.set_index("client_id")["num_tokens"]
    assert {int(n) % 4 for n in np.diff(part.offsets)} != {0}
    for one in passed:
        steps = np.diff(one.unit.row_offsets)
        assert steps.tolist() == [2 * -(-len(part.shard(c)) // 4) for c in one.unit.client_ids.tolist()]
        for i, c in enumerate(one.unit.client_ids.tolist()):
            rows = one.unit.rows[one.unit.row_offsets[i] : one.unit.row_offsets[i + 1]]
            assert sorted(rows[rows >= 0].tolist()) == sorted([*part.shard(c).tolist()] * 2)
            assert tokens[c] == 2 * lengths[part.shard(c)].sum() == one.reply.num_tokens[i]


def test_the_result_of_an_update_is_not_written_through():
    """State in, state out: aggregate leaves the state that it was given as it was."""
    method = runs.problem(tiny.spec()).method
    state = method.start()
    before = {name: t.clone() for name, t in state.tensors.items()}
    update = Update({name: torch.ones_like(t) for name, t in before.items()}, 1.0, (0,))
    after = method.aggregate(state, [update], 0)
    runs.same_tensors(state.tensors, before)
    assert all((t == 1).all() for t in after.tensors.values())


def test_events_are_plain_data():
    """They cross processes and become JSON."""
    for event in runs.run(tiny.spec(FAST)).events:
        assert json.loads(json.dumps(event))["num_rounds"] == 3
