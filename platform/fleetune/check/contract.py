"""What holds for every method: invariants, each a real run of the tiny world of 6 clients, 3 a round, 3 rounds of 2 steps.

A check takes a case and raises AssertionError if the method breaks what the check's first sentence says.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleetune import scopes
from fleetune import spec as specs
from fleetune.check import runs, tiny_world
from fleetune.cost.trace import PARTS
from fleetune.data.batches import NO_EXAMPLE, without
from fleetune.methods.base import Method, Payload, State
from fleetune.models import architectures as shapes
from fleetune.models.peft_format import as_pairs
from fleetune.pricing.mapping import CostedModel
from fleetune.pricing.tracing import Tracing, WorkShape
from fleetune.tensors import num_bytes, select
from fleetune.training.plan import ClientTask
from fleetune.training.worker import Worker


class NotApplicable(Exception):
    """Raised by a check that has nothing to say about a method; the text says why."""


@dataclass(frozen=True, eq=False)
class Case:
    """A method with settings. Two cases are never equal, so that each has a run of its own to be held against."""

    method: str
    """Its name, as in a job file."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Its settings, as in a job file: those that it needs to run on four blocks and three rounds."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted fields of the job."""
    when_stacked: dict[str, Any] = field(default_factory=dict)
    """Dotted fields that are set otherwise where cohorts of different sizes are compared."""


Check = Callable[[Case], None]
CHECKS: dict[str, Check] = {}
"""All checks by name, in the order in which they are written below."""


def contract(check: Check) -> Check:
    """Enter a function into `CHECKS`, under its name without ``check_``."""
    CHECKS[check.__name__.removeprefix("check_")] = check
    return check


def spec_of(case: Case, **overrides: Any) -> specs.RunSpec:
    """The tiny job with the case's method."""
    fast = {"evaluation.generate": False}
    return tiny_world.spec(case.method, case.settings, {**fast, **case.overrides, **overrides})


@functools.cache
def reference(case: Case) -> tuple[runs.Finished, list[runs.Passed]]:
    """The case's plain run, with all that crossed the seam."""
    return runs.recorded(spec_of(case))


def untrained(done: runs.Finished) -> State:
    """The state after all rounds of a run in which nobody learnt anything."""
    state = done.problem.method.start()
    for round_idx in range(done.problem.spec.rounds.num_rounds):
        state = runs.begun(done.problem, state, round_idx)
    return state


def at_rate_zero(case: Case) -> dict[str, float]:
    """The fields of all steps that are taken, set to 0: the clients' steps, and the server's if the method has a rate for it."""
    has_own = "learning_rate" in type(spec_of(case).method).model_fields
    return {"local.learning_rate": 0.0, **({"method.learning_rate": 0.0} if has_own else {})}


def other_is_held(done: runs.Finished) -> bool:
    """True if what the run's model holds frozen is not what the untrained one held."""
    held = done.deployed.model.held
    if not held:
        return False
    first = done.problem.method.deployed(done.problem.method.start(), lambda: iter(())).model.held
    return held.keys() != first.keys() or any(not torch.equal(held[name], first[name]) for name in held)


def per_round(done: runs.Finished) -> int:
    """Clients of a round: those that the job names, or the server that does the work of them all."""
    return 1 if done.problem.method.traits.pooled else 3


def tasks_of(passed: runs.Passed) -> tuple[int, list[ClientTask]]:
    """The first cohort of a unit: its payload's key and its tasks."""
    cohort = passed.unit.cohorts[0]
    return cohort.payload, passed.unit.tasks(cohort)


@contract
def check_three_rounds_are_finite_and_learn(case: Case) -> None:
    """Every number is finite, and the state is not what an untrained one would be, unless clients work on no batches."""
    done, _ = reference(case)
    assert [e["kind"] for e in done.events] == ["start", "round", "round", "round", "end"]
    assert done.rounds["round"].tolist() == [1, 2, 3]
    assert done.rounds["num_ok"].tolist() == [per_round(done)] * 3
    works = done.problem.method.traits.draws_batches  # without batches there is no training loss
    assert (np.isfinite(done.rounds["train_loss"]) == works).all()
    assert np.isfinite(done.rounds["eval_loss"].iloc[-1])
    numbers = done.clients.select_dtypes("number").drop(columns=[] if works else ["train_loss"])
    assert np.isfinite(numbers.to_numpy()).all()
    for name, tensor in done.state.tensors.items():
        assert torch.isfinite(tensor).all(), name
    fresh = untrained(done).tensors
    assert any(not torch.equal(done.state.tensors[name], fresh[name]) for name in fresh) == works


@contract
def check_the_same_seed_gives_the_same_bits(case: Case) -> None:
    """State, private tensors and tables of two runs are equal, bit for bit."""
    runs.same_runs(runs.run(spec_of(case)), reference(case)[0])


@contract
def check_another_seed_gives_other_numbers(case: Case) -> None:
    """With another seed, clients have other losses; otherwise equal bits would say nothing."""
    if not spec_of(case).method.traits.draws_batches:
        raise NotApplicable("clients that work on no batches have no losses")
    other = runs.run(spec_of(case, seed=1, **{"rounds.num_rounds": 3}))
    assert other.rounds["train_loss"].tolist() != reference(case)[0].rounds["train_loss"].tolist()


@contract
def check_a_run_that_is_stopped_goes_on_bit_for_bit(case: Case) -> None:
    """Stopped after a round and resumed, a run ends with the tensors, tables and adapter files of one that went through."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-run-"))
    stopped = runs.run(spec_of(case), folder=folder, stop_after=1)
    assert len(stopped.rounds) == 1
    resumed = runs.run(spec_of(case), folder=folder)
    assert [e["kind"] for e in resumed.events] == ["start", "round", "round", "end"]
    whole = reference(case)[0]
    runs.same_runs(resumed, whole)
    assert resumed.events[-1]["sim_seconds"] == whole.events[-1]["sim_seconds"]
    both = [sorted((run.run_dir.path / "adapter").iterdir()) for run in (resumed, whole)]
    assert [path.name for path in both[0]] == [path.name for path in both[1]] != []
    assert [path.read_bytes() for path in both[0]] == [path.read_bytes() for path in both[1]]


@contract
def check_learning_rate_zero_leaves_the_model_as_it_is(case: Case) -> None:
    """Nobody learns at rate 0: the state is that of rounds without clients, a B of 0 stays 0, the loss is the untrained model's.

    The loss may be another one if the method measures something without a rate and changes what is frozen by it (quotas).
    """
    if not spec_of(case).method.traits.steps:
        raise NotApplicable("a model that is put together from others takes no steps of a learning rate")
    done = runs.run(spec_of(case, **at_rate_zero(case)))
    fresh = untrained(done).tensors
    assert fresh.keys() <= done.state.tensors.keys()
    runs.close_tensors({name: done.state.tensors[name] for name in fresh}, fresh)
    pairs = as_pairs(done.deployed.adapter, scaling=1.0)  # a third factor may be what is 0
    begins_at_zero = not any(t.any() for name, t in fresh.items() if name.endswith(".lora_B"))
    assert not begins_at_zero or not any(t.any() for name, t in pairs.items() if name.endswith(".lora_B"))
    baseline = done.events[0]["baseline"]["eval_loss"]
    assert other_is_held(done) or math.isclose(done.rounds["eval_loss"].iloc[-1], baseline, rel_tol=1e-6)


@contract
def check_charged_bytes_are_those_of_the_tensors_passed(case: Case) -> None:
    """Up: the upload, and what crossed the cut. Down: the payload, what a client lacks for it, and the gradients at the cut.

    Where the server keeps what it was sent (`Traits.caches`), only what is new of each client's examples has crossed the cut.
    """
    done, passed = reference(case)
    method, worker = done.problem.method, runs.worker(done.problem)
    table = done.clients.set_index(["round", "client_id"])
    last: dict[int, str] = {}
    met: dict[int, set[int]] = {}  # client -> the examples of which the server keeps what it was sent
    for one in passed:
        reply = one.reply
        for cohort in one.unit.cohorts:
            given = {client: packed.unpack() for client, packed in one.given.items()}
            payload, tasks = one.payloads[cohort.payload], one.unit.tasks(cohort, given)
            update = method.local_update(worker, payload, tasks)
            sent = 0 if update.upload is None else update.upload.data[0].nbytes
            assert (reply.upload_bytes[cohort.start : cohort.stop] == sent).all()
            cut = reply.cut_bytes[:, cohort.start : cohort.stop]
            if method.traits.caches:
                cut = np.stack([cut_of_new(method, worker, payload, task, met) for task in tasks], axis=1)
            for i in range(cohort.start, cohort.stop):
                row = table.loc[(one.unit.round_idx + 1, reply.client_ids[i])]
                up, down = cut[:, i - cohort.start]
                assert row["uplink_bytes"] == reply.upload_bytes[i] + up
                client = int(reply.client_ids[i])
                lacking = 0
                if payload.provision is not None and last.get(client) != payload.provision.key:
                    lacking = min(num_bytes(form) for form in payload.provision.missing(last.get(client)))
                    last[client] = payload.provision.key
                assert row["downlink_bytes"] == num_bytes(payload.tensors) + lacking + down
                assert row["num_tokens"] == reply.num_tokens[i]
                assert row["train_loss"] == reply.losses[i] or not row["num_tokens"]
    assert len(table) == sum(len(one.reply.client_ids) for one in passed) == 3 * per_round(done)
    for name in ("uplink_bytes", "downlink_bytes"):
        assert done.clients.groupby("round")[name].sum().tolist() == done.rounds[name].tolist()


def cut_of_new(
    method: Method, worker: Worker, payload: Payload, task: ClientTask, met: dict[int, set[int]]
) -> np.ndarray:
    """Bytes at the cut each way, (2,), of work on those examples alone that the client has not ``met``; they are added to it."""
    known = met.setdefault(task.client_id, set())
    rows = without(task.rows, np.array(sorted(known), np.int64))
    known.update(task.rows[task.rows != NO_EXAMPLE].tolist())
    if not len(rows):
        return np.zeros(2, np.int64)
    cut = method.local_update(worker, payload, [replace(task, rows=rows)]).cut_bytes
    assert cut is not None
    return cut[:, 0]


@contextlib.contextmanager
def heavy_architecture() -> Iterator[str]:
    """An architecture to be costed: four blocks as wide as LLaMA2-70B's, 3.9 GB each in fp32, which are soon traced."""
    shape = shapes.ModelShape("heavy", 4, 8192, 28672, 64, 64, 128, 32000)
    shapes.ARCHITECTURES[shape.name] = shape
    try:
        yield shape.name
    finally:
        del shapes.ARCHITECTURES[shape.name]


@contract
def check_a_client_over_its_budget_is_refused_and_the_round_goes_on(case: Case) -> None:
    """A client whose memory is too small (Jetson Nano, 4 GB) is refused and spends nothing; the others (AGX Orin) work on."""
    with heavy_architecture() as heavy:
        done = runs.run(spec_of(case, **{"cost.model": heavy, "fleet.num_clients": 4}))
    clients = done.clients
    if done.problem.method.traits.pooled:
        assert (clients["status"] == "ok").all()  # the server has no budget
        return
    nano = clients["device"] == "jetson-nano"
    assert (clients["status"][nano] == "oom").all()
    assert (clients["status"][~nano] == "ok").all()
    assert nano.groupby(clients["round"]).sum().tolist() == done.rounds["num_oom"].tolist()
    assert 0 < nano.sum() < len(clients)
    assert (clients["peak_memory_bytes"][nano] > clients["budget_bytes"][nano]).all()
    spent = ["flops", "uplink_bytes", "downlink_bytes", "sim_seconds", "energy_joules", "num_tokens"]
    assert not clients.loc[nano, spent].to_numpy().any()
    always = [name for name in spent if name != "downlink_bytes"]  # the first payload of some methods is empty
    works, worked = done.problem.method.traits.draws_batches, clients.loc[~nano]
    if done.problem.method.traits.caches:  # of an example that it meets again a client sends nothing
        worked = worked.drop_duplicates("client_id")
    # Who works on no batches computes nothing, and the link to it is used once.
    assert worked[always].to_numpy().all() if works else worked["sim_seconds"].any()
    # Nothing comes down to a client that does not learn.
    sends_down = reference(case)[0].clients["downlink_bytes"].any()
    assert (clients.loc[~nano, "downlink_bytes"].sum() > 0) == sends_down
    assert (np.isfinite(done.rounds["train_loss"]) == works).all()


@contract
def check_a_round_of_refused_clients_changes_nothing(case: Case) -> None:
    """Nobody's memory suffices: the state is that of rounds without clients, nothing is sent, and nobody keeps anything."""
    if spec_of(case).method.traits.pooled:
        raise NotApplicable("a server that holds all data is never refused")
    with heavy_architecture() as heavy:
        done = runs.run(spec_of(case, **{"cost.model": heavy, "fleet.devices": {"jetson-nano": 1.0}}))
    assert done.rounds["num_oom"].tolist() == [3, 3, 3]
    assert done.rounds["train_loss"].isna().all()
    assert done.rounds["uplink_bytes"].tolist() == [0, 0, 0]
    runs.same_tensors(done.state.tensors, untrained(done).tensors)
    assert done.private == {}


@contract
def check_only_what_the_plan_names_changes_and_travels(case: Case) -> None:
    """One client's work: every trainable tensor moves, the others and all inputs keep their bits.

    What goes up beside the adapter's tensors (slopes) is the method's own; of the adapter it is what the plan names. What is not
    trained may only be changed by the plan's own `after_backward`.
    """
    done, passed = reference(case)
    method = done.problem.method
    key, tasks = tasks_of(passed[0])
    payload = passed[0].payloads[key]
    plan, start = method.local_plan(payload), method.client_adapter(payload)
    sent = {name: t.clone() for name, t in payload.tensors.items()}
    weights = {name: w.clone() for name, w in done.problem.inputs.base.weights.items()}
    update = method.local_update(runs.worker(done.problem), payload, tasks[:1])
    runs.same_tensors(payload.tensors, sent)
    runs.same_tensors(done.problem.inputs.base.weights, weights)
    server = select(update.server, start.__contains__)  # of a pooled method, which sends nothing
    learnt = update.upload.client(0) if update.upload is not None else server
    of_adapter = {name: tensor for name, tensor in learnt.items() if name in start}
    assert set(of_adapter) == {name for name in start if plan.uploads(name)}
    for name, tensor in of_adapter.items():
        if plan.trainable(name) or plan.after_backward is None:
            assert torch.equal(tensor, start[name]) != plan.trainable(name), name


@contract
def check_stacked_clients_learn_what_they_learn_one_by_one(case: Case) -> None:
    """Cohorts of three against cohorts of one: the state agrees to 1e-4, for every method that stacks."""
    together = runs.run(spec_of(case, **case.when_stacked, **{"execution.cohort": 3}))
    alone = runs.run(spec_of(case, **case.when_stacked, **{"execution.cohort": 1}))
    assert together.state.tensors.keys() == alone.state.tensors.keys()
    for name, tensor in together.state.tensors.items():
        torch.testing.assert_close(tensor, alone.state.tensors[name], rtol=1e-4, atol=1e-5, msg=name)
    for client in together.private:
        runs.close_tensors(together.private[client], alone.private[client], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together.clients["train_loss"], alone.clients["train_loss"], rtol=1e-5)


@contract
def check_private_state_stays_with_its_client(case: Case) -> None:
    """Every client resumes from the very bits that it kept last, and no two clients keep the same."""
    done, passed = reference(case)
    kept: dict[int, dict[str, Tensor]] = {}
    for one in passed:
        for client_id in one.unit.client_ids.tolist():
            given = one.given.get(client_id)
            assert (given is not None) == (client_id in kept)
            if given is not None:
                runs.same_tensors(given.unpack(), kept[client_id])
        kept.update({client: packed.unpack() for client, packed in one.kept.items()})
    for a in kept:
        for b in kept:
            assert a == b or any(not torch.equal(kept[a][name], kept[b][name]) for name in kept[a])
    assert bool(kept) == done.problem.method.traits.private


@contract
def check_stacked_work_is_in_the_order_of_its_tasks(case: Case) -> None:
    """Clients with fewer steps leave the stack early, yet each loss and upload is its own client's."""
    done, passed = reference(case)
    method = done.problem.method
    if method.traits.coupled:
        raise NotApplicable("clients of a shared server half do not learn alone")
    if method.traits.pooled:
        raise NotApplicable("a server that works alone has nobody to be stacked with")
    if not method.traits.draws_batches:
        raise NotApplicable("clients that work on no batches send nothing")
    key, _ = tasks_of(passed[0])
    # Of the first round, two clients, whatever each was sent then: here both work on one payload.
    first = [one.unit for one in passed if one.unit.round_idx == 0]
    tasks = [task for unit in first for cohort in unit.cohorts for task in unit.tasks(cohort)][:2]
    assert len(tasks) == 2
    short = ClientTask(**{**vars(tasks[0]), "rows": tasks[0].rows[:1]})
    payload, worker = passed[0].payloads[key], runs.worker(done.problem)
    both = method.local_update(worker, payload, [short, tasks[1]])
    assert both.upload is not None
    summed = method.summand(payload, both.upload, [short, tasks[1]])
    for k, task in enumerate((short, tasks[1])):
        alone = method.local_update(worker, payload, [task])
        assert alone.upload is not None
        alone_summed = method.summand(payload, alone.upload, [task])
        assert math.isclose(both.losses[k], alone.losses[0], rel_tol=1e-5)
        assert both.num_tokens[k] == alone.num_tokens[0]
        runs.close_tensors(summed.client(k), alone_summed.client(0), rtol=1e-4, atol=1e-5)


@contract
def check_gradients_are_computed_if_and_only_if_the_method_says_so(case: Case) -> None:
    """A client of forward passes alone never starts a backward pass, and its trace keeps nothing for one.

    Every way into autograd is watched in one client's real work, and the trace's parts that only a backward pass needs are 0.
    The server's half of a cut model may learn all the same.
    """
    done, passed = reference(case)
    method = done.problem.method
    key, tasks = tasks_of(passed[0])
    payload = passed[0].payloads[key]
    with watched_autograd(forbidden=not method.traits.backward) as calls:
        method.local_update(runs.worker(done.problem), payload, tasks[:1])
    assert bool(calls) == method.traits.backward
    spec, model = done.problem.spec, CostedModel(done.problem.inputs.base, axes=method.axes)
    found = Tracing(model, method, spec.model.lora, spec.local, None).trace(payload, WorkShape())
    of_backward = [PARTS.index(name) for name in ("gradients", "optimizer", "saved")]
    stored = found.saved.any() or found.moments[:, of_backward].any()
    assert bool(stored) == method.traits.backward


@contextlib.contextmanager
def watched_autograd(*, forbidden: bool) -> Iterator[list[str]]:
    """Notes every call with which a client starts a backward pass; it raises instead if that is forbidden."""
    calls: list[str] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if scopes.current.side == scopes.CLIENT:
                assert not forbidden, (
                    f"{function.__name__} is called, but the method says that it computes no gradients"
                )
                calls.append(function.__name__)
            return function(*args, **kwargs)

        return wrapper

    ways = [(owner, name, getattr(owner, name)) for owner, name in (
        (Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad"),
    )]  # fmt: skip
    for owner, name, function in ways:
        setattr(owner, name, watched(function))
    try:
        yield calls
    finally:
        for owner, name, function in ways:
            setattr(owner, name, function)
