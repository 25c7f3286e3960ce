"""The family of split learning: where the model is cut changes neither what is learnt nor what crosses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fleetune.data.batches import collate
from fleetune.methods.base import State
from fleetune.methods.split import SplitMethod
from fleetune.methods.split_round import Path
from fleetune.problem import Problem
from fleetune.tensors import Tensors
from fleetune.training.loss import cohort_loss
from fleetune.training.plan import ClientTask, CohortUpdate
from support import runs, tiny

RATE = 0.5
SGD = {
    "evaluation.generate": False,
    "local.max_grad_norm": None,
    "local.optimizer": "sgd",
    "local.learning_rate": RATE,
}
ONE = {"fleet.num_clients": 1, "fleet.devices": {"jetson-nano": 1.0}, "rounds.clients_per_round": 1}
FAMILY = ("sl", "sfl", "split-lora", "split-frozen")
HIDDEN = 32


def made(name: str, **overrides: object) -> tuple[Problem, SplitMethod]:
    problem = runs.problem(tiny.spec({**SGD, **overrides}, method=name))
    assert isinstance(problem.method, SplitMethod)
    return problem, problem.method


def warm(method: SplitMethod) -> State:
    """A state whose B is not zero, so that A learns too."""
    generator = torch.Generator().manual_seed(0)
    start = method.start().tensors
    return State({n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in start.items()})


def a_task(problem: Problem, client: int = 0, *, steps: int = 1, weight: float = 1.0) -> ClientTask:
    """A client with two examples a step, which no other client has."""
    rows = np.arange(2 * steps).reshape(-1, 2) + 20 * client
    return ClientTask(client, weight, rows, problem.spec.local.learning_rate, address=(0, 0))


def worked(problem: Problem, method: SplitMethod, state: State, tasks: list[ClientTask]) -> CohortUpdate:
    return method.local_update(runs.worker(problem), method.broadcast(state, 0, None), tasks)


def padded(problem: Problem, task: ClientTask) -> int:
    """B L, summed over the client's steps: each batch is padded to its longest example."""
    sizes = np.diff(problem.inputs.train.offsets)
    return int(sizes[task.rows].max(axis=1).sum()) * task.rows.shape[1]


def whole_gradients(problem: Problem, params: Tensors, task: ClientTask, dtype: torch.dtype) -> Tensors:
    """Gradients of the uncut model on a client's first batch."""
    network = runs.worker(problem).network(problem.method.context.whole_model)
    network.model.to(dtype)
    ids, labels = (torch.from_numpy(a) for a in collate(problem.inputs.train, task.rows[0]))
    leaves = {name: p.to(dtype).requires_grad_() for name, p in params.items()}
    network.set_adapter({name: leaf[None] for name, leaf in leaves.items()})
    loss, _ = cohort_loss(network, network.blocks(network.embed(ids)), labels, 1)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("head", ["server", "client"])
@pytest.mark.parametrize("split_point", [1, 3])
@pytest.mark.parametrize("name", ["sl", "sfl", "split-lora"])
def test_split_gradients_are_those_of_the_whole_model(name: str, split_point: int, head: str):
    """In float64, to 1e-10: (before - after) / rate of one SGD step is the uncut model's gradient, wherever the cut is."""
    problem, method = made(name, **{"method.split_point": split_point, "method.head": head})
    state = State({n: t.double() for n, t in warm(method).tensors.items()})
    worker = runs.worker(problem)
    worker.network(method.context.whole_model).model.double()
    task = a_task(problem)
    update = method.local_update(worker, method.broadcast(state, 0, None), [task])
    assert update.upload is not None
    after = {**update.upload.client(0), **update.server}
    for tensor_name, grad in whole_gradients(problem, state.tensors, task, torch.float64).items():
        found = (state.tensors[tensor_name] - after[tensor_name]) / RATE
        torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-10, msg=tensor_name)


@pytest.mark.parametrize("precision", ["same", "fp16", "int8"])
@pytest.mark.parametrize("name", FAMILY)
def test_bytes_at_the_cut_are_the_formulas(name: str, precision: str):
    """Up B L (h b_a + 4) with labels of 4 bytes, down B L h b_a or nothing; int8 adds a scale of 4 bytes per token."""
    per_token = {"same": 4 * HIDDEN, "fp16": 2 * HIDDEN, "int8": HIDDEN + 4}[precision]
    for split_point in (1, 2, 3):
        problem, method = made(name, **{"method.split_point": split_point, "method.cut_precision": precision})
        tasks = [a_task(problem, 0, steps=2, weight=0.5), a_task(problem, 1, weight=0.5)]
        update = worked(problem, method, warm(method), tasks)
        assert update.cut_bytes is not None
        for k, task in enumerate(tasks):
            tokens = padded(problem, task)
            down = 0 if name == "split-frozen" else tokens * per_token
            assert update.cut_bytes[:, k].tolist() == [tokens * (per_token + 4), down]


def test_with_the_head_on_the_client_no_labels_go_up():
    """B L h b_a four times: activations and dL/dH up, hidden states and dL/dS down."""
    problem, method = made("split-lora", **{"method.head": "client"})
    task = a_task(problem)
    update = worked(problem, method, warm(method), [task])
    assert update.cut_bytes is not None
    assert update.cut_bytes[:, 0].tolist() == [2 * padded(problem, task) * 4 * HIDDEN] * 2


@pytest.mark.parametrize("name", FAMILY)
def test_the_prices_of_a_run_do_not_depend_on_the_cut(name: str):
    """What crosses in a round, beside the adapters, is the same after the first block as after the third."""
    cut = []
    for split_point in (1, 3):
        done = runs.run(tiny.spec({**SGD, "method.split_point": split_point, "rounds.num_rounds": 1}, method=name))
        half = done.problem.method.broadcast(done.problem.method.start(), 0, None).tensors
        adapter = sum(t.nbytes for t in half.values())
        cut.append(done.clients[["uplink_bytes", "downlink_bytes"]].to_numpy() - adapter)
    np.testing.assert_array_equal(cut[0], cut[1])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_rounding_at_the_cut_changes_little_but_something(precision: str):
    updates = []
    for form in ("same", precision):
        problem, method = made("split-lora", **{"method.cut_precision": form})
        update = worked(problem, method, warm(method), [a_task(problem)])
        assert update.upload is not None
        updates.append(update.upload.data)
    error = (updates[0] - updates[1]).abs().max().item()
    assert 0 < error < 0.02


def same_learning(a: runs.Finished, b: runs.Finished) -> None:
    runs.close_tensors(a.state.tensors, b.state.tensors, rtol=1e-6)
    np.testing.assert_allclose(a.clients["train_loss"], b.clients["train_loss"], rtol=1e-6)


def test_with_one_client_all_variants_are_one():
    """SplitFed v1, v2, split learning and SplitLoRA, and a half that is kept for two rounds: three rounds of SGD alike."""
    first = runs.run(tiny.spec({**SGD, **ONE}, method="split-lora"))
    for name, settings in (
        ("sfl", {"method.version": "v1"}),
        ("sfl", {"method.version": "v2"}),
        ("sl", {}),
        ("split-lora", {"method.aggregate_every": 3}),
    ):
        same_learning(runs.run(tiny.spec({**SGD, **ONE, **settings}, method=name)), first)


def test_a_kept_half_is_sent_down_and_up_once_in_its_period():
    """Three clients, I = 2, three rounds: the half goes up in round 2 alone, and down when a period begins."""
    whole = {"fleet.num_clients": 3, "rounds.clients_per_round": 3, "method.aggregate_every": 2}
    done, passed = runs.recorded(tiny.spec({**SGD, **whole}, method="split-lora"))
    method = done.problem.method
    assert isinstance(method, SplitMethod)
    half = sum(t.nbytes for n, t in method.context.fresh_adapter().items() if method.on_client(n))
    cut = {
        (one.unit.round_idx, int(c)): one.reply.cut_bytes[:, i]
        for one in passed
        for i, c in enumerate(one.reply.client_ids)
    }
    for row in done.clients.to_dict("records"):
        up, down = cut[row["round"] - 1, row["client_id"]]
        assert row["uplink_bytes"] - up == (half if row["round"] == 2 else 0)
        assert row["downlink_bytes"] - down == (half if row["round"] in (1, 3) else 0)
    assert done.state.values["period"] == 1


def test_a_path_that_teaches_nobody_is_charged_up_alone():
    """Two paths of the same examples: the loss sees both, the second sends activations without labels, and nothing returns."""
    problem, method = made("split-lora")
    seen: list[tuple[int, bool]] = []

    class TwoPaths(type(method)):  # type: ignore[misc]
        def paths(self, examples: np.ndarray) -> list[Path]:
            return [Path(examples), Path(examples, learns="neither", sends_labels=False)]

        def loss(self, network, hidden, batches, num_clients) -> Tensor:  # type: ignore[no-untyped-def]
            seen.append((len(batches), hidden[1].requires_grad))
            torch.testing.assert_close(hidden[0], hidden[1])
            return super().loss(network, hidden, batches, num_clients)

    task = a_task(problem)
    plain = worked(problem, method, warm(method), [task])
    both = worked(problem, TwoPaths(method.config, method.context), warm(method), [task])
    assert seen == [(2, False)]
    assert plain.upload is not None
    assert both.upload is not None
    assert torch.equal(plain.upload.data, both.upload.data)
    assert plain.cut_bytes is not None
    assert both.cut_bytes is not None
    extra = both.cut_bytes[:, 0] - plain.cut_bytes[:, 0]
    assert extra.tolist() == [padded(problem, task) * 4 * HIDDEN, 0]


@pytest.mark.parametrize("name", FAMILY)
def test_a_four_bit_model_can_be_cut(name: str):
    """An nf4 base on a CPU, end to end: the loss falls on both sides of the cut."""
    job = {
        "evaluation.generate": False,
        "model.quantization": "nf4",
        "rounds.num_rounds": 2,
        "local.learning_rate": 0.01,
    }
    done = runs.run(tiny.spec(job, method=name))
    assert np.isfinite(done.rounds["train_loss"]).all()
    assert done.rounds["eval_loss"].iloc[-1] < done.events[0]["baseline"]["eval_loss"]


def test_a_fraction_of_the_depth_is_the_nearest_block():
    """Of four blocks 0.3 is 1.2, so one, and 0.375 is 1.5, so two."""
    for fraction, blocks in ((0.3, 1), (0.375, 2), (0.5, 2), (0.8, 3)):
        assert made("sfl", **{"method.split_point": fraction})[1].num_client_blocks == blocks
    whole, part = (
        runs.run(tiny.spec({**SGD, "rounds.num_rounds": 1, "method.split_point": c}, method="sfl")) for c in (2, 0.5)
    )
    runs.same_tensors(whole.state.tensors, part.state.tensors)
    assert whole.clients["sim_seconds"].tolist() == part.clients["sim_seconds"].tolist()
