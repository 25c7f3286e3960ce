"""FwdLLM: slopes by forward passes go up, and the server steps once their variance is small enough."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fleetune.cost.polynomials import monomials
from fleetune.engine.round.ranks import filled
from fleetune.errors import UserError
from fleetune.methods.base import Payload, State, Update
from fleetune.methods.fwdllm import HALVES, LAST, SUM, FwdLLM, variance_of
from fleetune.models.network import Network
from fleetune.plan.walk import plan
from fleetune.pricing.mapping import CostedModel
from fleetune.pricing.tracing import Tracing, WorkShape
from fleetune.tensors import Stack, Tensors
from fleetune.training.loss import cohort_loss
from fleetune.training.plan import ClientTask, CohortUpdate
from fleetune.training.slopes import draw
from fleetune.training.trainer import collate_step
from fleetune.training.worker import Worker
from support import runs, tiny

FAST = {"evaluation.generate": False, "model.lora.targets": ["q_proj", "v_proj"]}


def spec_of(**overrides: Any) -> Any:
    return tiny.spec({**FAST, **{name.replace("__", "."): value for name, value in overrides.items()}}, method="fwdllm")


def made(**overrides: Any) -> tuple[runs.Problem, FwdLLM, Payload]:
    """A problem, its method and the first round's payload, whose B are not 0, so that A has a gradient too."""
    problem = runs.problem(spec_of(**overrides))
    method = problem.method
    assert isinstance(method, FwdLLM)
    tensors = {
        name: t + 0.05 * torch.sin(torch.arange(t.numel())).view(t.shape) for name, t in method.start().tensors.items()
    }
    return problem, method, Payload(tensors)


def task(rows: list[list[int]], client_id: int = 0, round_idx: int = 0) -> ClientTask:
    return ClientTask(client_id, 1.0, np.array(rows), 0.0, (0, round_idx))


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def first_loss(worker: Worker, method: FwdLLM, payload: Payload, adapter: Tensors, one: ClientTask) -> Tensor:
    """The loss of a client's first batch with an adapter, as a scalar."""
    network = worker.network(method.model(payload))
    network.set_adapter({name: t[None] for name, t in adapter.items()})
    ids, labels = collate_step(worker.data, [one], 0, network.device)
    loss, _ = cohort_loss(network, network.blocks(network.embed(ids)), labels, 1)
    return loss[0]


def test_a_slope_is_the_central_difference_and_the_server_rebuilds_its_gradient():
    """One client, one step, one direction: j = (L(theta + h v) - L(theta - h v)) / (2 h), and the summand is j v."""
    problem, method, payload = made(method__directions=1)
    worker, one = runs.worker(problem), task([[0, 1]])
    update = method.local_update(worker, payload, [one])
    v = torch.empty(flat(payload.tensors).numel())
    draw(v, one, 0, 0)
    named = Stack({name: tuple(t.shape) for name, t in payload.tensors.items()}, v[None]).client(0)
    h = method.config.h
    losses = []
    for sign in (1, -1):
        moved = {name: t + sign * h * named[name] for name, t in payload.tensors.items()}
        losses.append(float(first_loss(worker, method, payload, moved, one)))
    slope = (losses[0] - losses[1]) / (2 * h)
    assert update.upload is not None
    assert float(update.upload.data[0, 0]) == pytest.approx(slope, rel=1e-3)
    assert update.losses[0] == pytest.approx(sum(losses) / 2, rel=1e-5)
    total = method.summand(payload, update.upload, [one]).client(0)
    for name, tensor in named.items():
        torch.testing.assert_close(total[SUM + name], float(update.upload.data[0, 0]) * tensor)


def test_the_estimate_turns_towards_the_gradient_as_directions_are_added():
    """Its cosine with the true gradient is about sqrt(N / (N + d)) for N directions in d dimensions (d = 1,024 here)."""
    problem, method, payload = made(method__h=0.01)
    worker, one = runs.worker(problem), task([[0, 1, 2, 3]])
    leaves = {name: t.clone().requires_grad_() for name, t in payload.tensors.items()}
    first_loss(worker, method, payload, leaves, one).backward()
    truth = flat({name: t.grad for name, t in leaves.items() if t.grad is not None})
    found = []
    for num_directions in (32, 256):
        many = FwdLLM(method.config.model_copy(update={"directions": num_directions}), method.context)
        update = many.local_update(worker, payload, [one])
        assert update.upload is not None
        estimate = flat(many.summand(payload, update.upload, [one]).client(0))
        cosine = float(torch.dot(estimate, truth) / estimate.norm() / truth.norm())
        expected = math.sqrt(num_directions / (num_directions + len(truth)))
        assert cosine == pytest.approx(
            expected, abs=4 / math.sqrt(len(truth))
        )  # the cosine of one draw varies by 1 / sqrt(d)
        found.append(cosine)
    assert found[0] < found[1]


def test_there_are_two_forward_passes_per_direction(monkeypatch: pytest.MonkeyPatch):
    """2 steps of 3 directions: 12 passes for the full cohort, stacked, and candidates that are not kept take none."""
    problem, method, payload = made(method__directions=3, method__candidates=4)
    passes = []
    blocks = Network.blocks
    monkeypatch.setattr(Network, "blocks", lambda *args, **more: passes.append(1) or blocks(*args, **more))
    payload = Payload({**payload.tensors, **{LAST + name: t for name, t in payload.tensors.items()}})
    method.local_update(runs.worker(problem), payload, [task([[0, 1], [2, 3]], 0), task([[4, 5], [6, 7]], 1)])
    assert len(passes) == 2 * 3 * 2


def test_directions_are_those_of_the_client_whoever_it_is_stacked_with():
    """Its seed is its own, of the run, the round and its id; another round has other directions."""
    row, same, other = torch.empty(3, 8)
    draw(row, task([[0]], client_id=4), 1, 2)
    draw(same, task([[0], [1]], client_id=4), 1, 2)
    assert torch.equal(row, same)
    for one, step, number in (
        (task([[0]], 5), 1, 2),
        (task([[0]], 4, 1), 1, 2),
        (task([[0]], 4), 0, 2),
        (task([[0]], 4), 1, 3),
    ):
        draw(other, one, step, number)
        assert not torch.equal(row, other)


def test_the_kept_candidates_are_those_nearest_to_the_last_gradient():
    """Their numbers go up beside the slopes, and the server weighs these directions and no others."""
    problem, method, payload = made(method__directions=2, method__candidates=5)
    one, last = (
        task([[0, 1]]),
        {LAST + name: torch.cos(torch.arange(t.numel())).view(t.shape) for name, t in payload.tensors.items()},
    )
    payload = Payload({**payload.tensors, **last})
    update = method.local_update(runs.worker(problem), payload, [one])
    assert update.upload is not None
    towards, v = flat(last), torch.empty(flat(last).numel())
    cosines = []
    for number in range(10):
        draw(v, one, 0, number)
        cosines.append(float(torch.dot(v, towards) / v.norm()))
    sent = update.upload.client(0)
    assert sent["numbers"].tolist() == [sorted(np.argsort(cosines)[-2:].tolist())]
    total = flat(method.summand(payload, update.upload, [one]).client(0))
    expected = torch.zeros_like(total)
    for slope, number in zip(sent["slopes"][0].tolist(), sent["numbers"][0].tolist(), strict=True):
        draw(v, one, 0, int(number))
        expected += slope * v / 2
    torch.testing.assert_close(total, expected)


def test_the_variance_is_that_of_two_half_means():
    """Means (1, 2) and (3, 2) of halves with weights 1/4 and 3/4: mean of (1 - 3)^2 / 2 and 0 is 1. An empty half has none."""
    sums = {
        HALVES[0] + "x": torch.tensor([0.25, 0.5]), HALVES[0] + "weight": torch.tensor([0.25]),
        HALVES[1] + "x": torch.tensor([2.25, 1.5]), HALVES[1] + "weight": torch.tensor([0.75]),
    }  # fmt: skip
    assert variance_of(sums) == 1.0
    assert variance_of({**sums, HALVES[0] + "weight": torch.zeros(1)}) is None


def test_the_halves_share_a_clients_slopes():
    """Of 2 steps of 2 directions each half has two: the parts add up to the gradient, and either weighs 1/2."""
    problem, method, payload = made(method__threshold=1.0, method__directions=2)
    one = task([[0, 1], [2, 3]])
    update = method.local_update(runs.worker(problem), payload, [one])
    assert update.upload is not None
    total = method.summand(payload, update.upload, [one]).client(0)
    *_, monitored = payload.tensors
    torch.testing.assert_close(sum(total[half + monitored] for half in HALVES), total[SUM + monitored])
    assert [total[half + "weight"].item() for half in HALVES] == [0.5, 0.5]


def test_the_step_is_along_the_mean_of_all_gradients_that_waited():
    """Gradients 1 and 3 of two rounds, rate 0.5: theta = 10 - 0.5 · 2 = 9. The first waits, as its variance 8 exceeds 2."""
    _, method, _ = made(method__threshold=2.0, method__learning_rate=0.5, method__candidates=2)

    def update(a: float, b: float) -> list[Update]:
        halves = {h + "x": torch.tensor([0.5 * x]) for h, x in zip(HALVES, (a, b), strict=True)}
        weights = {h + "weight": torch.tensor([0.5]) for h in HALVES}
        return [Update({SUM + "x": torch.tensor([(a + b) / 2]), **halves, **weights}, 1.0, (0, 1))]

    begun = State({"x": torch.tensor([10.0])}, method.start().values)
    waiting = method.aggregate(begun, update(-1.0, 3.0), 4)
    assert waiting.tensors["x"].item() == 10.0
    assert waiting.values == {"waiting": 1, "drawn_from": 4, "variance": 8.0}
    assert (method.drawn_from(begun, 4), method.drawn_from(waiting, 5)) == (4, 4)
    after = method.aggregate(waiting, update(3.0, 3.0), 5)
    assert {name: t.item() for name, t in after.tensors.items()} == {"x": 9.0, LAST + "x": 2.0}
    assert after.values == {"waiting": 0, "drawn_from": None, "variance": 2.0}
    assert waiting.tensors[SUM + "x"].item() == 1.0  # a state is never changed in place


def test_a_large_threshold_steps_in_every_round_and_zero_in_none():
    """With one that nothing exceeds the run is that without pacing. With 0 the adapter keeps its bits, and the clients of the
    first round are asked again for work on the same examples."""
    plain, always = runs.run(spec_of()), runs.run(spec_of(method__threshold=1e12))
    assert not always.rounds["waiting"].any()
    runs.same_tensors(plain.state.tensors, always.state.tensors)
    never = runs.run(spec_of(method__threshold=0.0))
    assert never.rounds["waiting"].tolist() == [1, 2, 3]
    fresh = never.problem.method.start().tensors
    runs.same_tensors({name: never.state.tensors[name] for name in fresh}, fresh)
    asked = never.clients.groupby("round")[["client_id", "num_tokens"]].agg(list)
    assert asked.iloc[0].tolist() == asked.iloc[1].tolist() == asked.iloc[2].tolist()
    assert never.rounds["train_loss"].nunique() == 3  # along other directions


def test_a_run_that_is_stopped_while_gradients_wait_goes_on_bit_for_bit(tmp_path: Path):
    spec = spec_of(method__threshold=0.0)
    assert len(runs.run(spec, folder=tmp_path, stop_after=2).rounds) == 2
    runs.same_runs(runs.run(spec, folder=tmp_path), runs.run(spec))


@pytest.mark.parametrize("candidates", [1, 2])
def test_clients_are_charged_four_bytes_for_each_number_of_their_own_steps(candidates: int):
    """Shards of unequal size and passes over them: clients of one cohort take unequally many steps."""
    overrides = {"local.epochs": 1.0, "execution.cohort": 6, "method.candidates": candidates, "rounds.num_rounds": 2}
    done, passed = runs.recorded(spec_of(**overrides))
    for one in passed:
        steps = np.diff(one.unit.row_offsets)
        assert len(set(steps.tolist())) > 1
        numbers = (
            1 if one.unit.round_idx == 0 else candidates
        )  # there is no last gradient in the first round: no choice
        assert one.reply.upload_bytes.tolist() == (4 * 2 * numbers * steps).tolist()
        table = done.clients[done.clients["round"] == one.unit.round_idx + 1].set_index("client_id")
        assert table.loc[one.unit.client_ids, "uplink_bytes"].tolist() == one.reply.upload_bytes.tolist()


def test_a_plan_prices_what_a_run_is_charged():
    """Also on another architecture, whose steps are traced on shallow models: slopes are as many, the adapter is larger."""
    sampled = {"method.candidates": 2, "cost.model": "llama2-7b", "fleet.devices": {"server-a100": 1.0}}
    planned, done = plan(spec_of(**sampled)), runs.run(spec_of(**sampled))
    for name in ("uplink_bytes", "downlink_bytes", "sim_seconds"):
        assert [row[name] for row in planned.rounds] == done.rounds[name].tolist()
    assert done.rounds["uplink_bytes"].tolist() == [3 * 2 * 2 * 4, 3 * 2 * 2 * 8, 3 * 2 * 2 * 8]
    first, second, third = done.rounds["downlink_bytes"].tolist()
    assert first == 3 * 4 * 32 * 2 * 2 * (4096 + 4096)  # clients, bytes, blocks, layers, rank, in and out
    assert second == third == 2 * first  # with the last gradient


def test_ranks_that_nobody_trains_receive_no_gradient():
    """Clients cut to rank 1 of 2: the second rank of every pair keeps its bits."""
    problem, method, payload = made(method__candidates=2)
    narrow = method.narrowed(payload, 1)
    one = task([[0, 1]])
    update = method.local_update(runs.worker(problem), narrow, [one])
    assert update.upload is not None
    total = method.summand(narrow, update.upload, [one]).client(0)
    full = filled(total, payload.tensors, total_weight=1.0, trained=np.array([1.0, 0.0]), axes=method.axes)
    after = method.aggregate(State(payload.tensors, method.start().values), [Update(full, 1.0, (0,))], 0)
    for name, tensor in payload.tensors.items():
        axis = 0 if name.endswith("lora_A") else 1
        assert torch.equal(after.tensors[name].select(axis, 1), tensor.select(axis, 1))
        assert not torch.equal(after.tensors[name].select(axis, 0), tensor.select(axis, 0))


class Inference(FwdLLM):
    """One forward pass of a step's batch with the adapter as it is, in place of all measurements."""

    @torch.no_grad()
    def local_update(self, worker: Worker, payload: Payload, tasks: Any) -> CohortUpdate:
        network = worker.network(self.model(payload))
        network.set_adapter({name: t[None] for name, t in payload.tensors.items()})
        for step in range(len(tasks[0].rows)):
            ids, labels = collate_step(worker.data, tasks, step, network.device)
            cohort_loss(network, network.blocks(network.embed(ids)), labels, 1)
        network.set_adapter(None)
        return CohortUpdate(Stack({"slopes": (1,)}, torch.zeros(1, 1)), np.zeros(1), np.zeros(1, np.int64))


def test_the_peak_is_that_of_inference_and_two_pieces_of_the_adapters_size():
    """theta, which the pass of inference takes from the payload, and the point at which the loss is measured."""
    problem, method, payload = made(method__directions=1)
    spec = problem.spec
    peaks = []
    for one in (method, Inference(method.config, method.context)):
        tracing = Tracing(CostedModel(problem.inputs.base), one, spec.model.lora, spec.local, None)
        peaks.append(tracing.trace(payload, WorkShape()).peak(monomials(2, 32, 16)[None]).sum())
    assert peaks[0] - peaks[1] == 2 * 4 * flat(payload.tensors).numel()


def test_flops_are_those_of_two_forward_passes_per_direction():
    problem, method, payload = made(method__directions=1)
    spec = problem.spec
    flops = []
    for one in (method, Inference(method.config, method.context)):
        tracing = Tracing(CostedModel(problem.inputs.base), one, spec.model.lora, spec.local, None)
        flops.append(tracing.trace(payload, WorkShape()).client.flops)
    np.testing.assert_allclose(flops[0], 2 * flops[1])


def test_the_step_size_rises_and_falls():
    """2 rounds of warm-up of 6: 1/2, 1, and then 4/4, 3/4, 2/4, 1/4 of the rate."""
    _, method, _ = made(
        rounds__num_rounds=6, method__learning_rate=1.0, method__warm_up_rounds=2, method__schedule="linear"
    )
    assert [method.learning_rate_at(t) for t in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("field", "overrides"),
    [("model.lora.dropout", {"model.lora.dropout": 0.1}), ("method.warm_up_rounds", {"method.warm_up_rounds": 3})],
)
def test_settings_that_contradict_each_other_are_refused(field: str, overrides: dict[str, Any]):
    with pytest.raises(UserError) as caught:
        runs.problem(spec_of(**overrides))
    assert caught.value.field == field
