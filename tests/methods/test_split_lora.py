"""SplitLoRA: the cut changes where the work is done, not what is learnt, as long as every client has its own server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fleetune.data.batches import NO_EXAMPLE, collate
from fleetune.errors import UserError
from fleetune.methods.base import Payload, State, Update
from fleetune.methods.split_lora import SplitLoRA
from fleetune.models.network import Network
from fleetune.problem import Problem
from fleetune.tensors import Tensors
from fleetune.training.loss import cohort_loss
from fleetune.training.plan import ClientTask, CohortUpdate
from support import runs, tiny

FAST = {"evaluation.generate": False, "local.max_grad_norm": None}
RATE = 0.5
SGD = {**FAST, "local.optimizer": "sgd", "local.learning_rate": RATE}


def made(server: str, **overrides: object) -> tuple[Problem, SplitLoRA]:
    problem = runs.problem(tiny.spec({**SGD, "method.server": server, **overrides}, method="split-lora"))
    assert isinstance(problem.method, SplitLoRA)
    return problem, problem.method


def payload_of(method: SplitLoRA, state: State) -> Payload:
    return method.broadcast(state, 0, None)


def tasks(problem: Problem, num_steps: Sequence[int]) -> list[ClientTask]:
    """Clients 0, 1, … with two examples a step and equal weights."""
    rows = np.arange(2 * sum(num_steps)).reshape(-1, 2)
    starts = np.cumsum([0, *num_steps])
    rate = problem.spec.local.learning_rate
    return [
        ClientTask(k, 1 / len(num_steps), rows[starts[k] : starts[k + 1]], rate, address=(0, 0))
        for k in range(len(num_steps))
    ]


def gradients(problem: Problem, network: Network, params: Tensors, rows: np.ndarray) -> tuple[float, Tensors]:
    """Loss and gradients of the whole model on one batch: nothing is cut."""
    ids, labels = (torch.from_numpy(a) for a in collate(problem.inputs.train, rows))
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    network.set_adapter({name: leaf[None] for name, leaf in leaves.items()})
    loss, _ = cohort_loss(network, network.blocks(network.embed(ids)), labels, 1)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    network.set_adapter(None)
    return loss.item(), dict(zip(leaves, grads, strict=True))


def upload_of(update: CohortUpdate, k: int) -> Tensors:
    assert update.upload is not None
    return update.upload.client(k)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def warm_state(method: SplitLoRA) -> State:
    """A state whose B is not zero, so that A learns too."""
    generator = torch.Generator().manual_seed(0)
    start = method.start().tensors
    return State({n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in start.items()})


def test_the_gradient_through_the_cut_is_the_whole_models():
    """One client, one SGD step: (before - after) / lr is the gradient of the uncut model, in both halves."""
    problem, method = made("concatenated")
    state = warm_state(method)
    worker = runs.worker(problem)
    task = tasks(problem, [1])[0]
    update = method.local_update(worker, payload_of(method, state), [task])
    network = worker.network(method.local_plan(payload_of(method, state)).model)
    loss, whole = gradients(problem, network, state.tensors, task.rows[0])
    after = {**upload_of(update, 0), **update.server}
    assert update.losses[0] == pytest.approx(loss, rel=1e-6)
    assert after.keys() == state.tensors.keys()
    for name, grad in whole.items():
        close(after[name], state.tensors[name] - RATE * grad)


def test_a_shared_server_follows_the_mean_and_each_client_its_own_gradient():
    """Two clients, one step: Phi <- Phi - lr (g_0 + g_1) / 2 and Theta_k <- Theta_k - lr g_k, all at the same Phi."""
    problem, method = made("concatenated")
    state = warm_state(method)
    worker = runs.worker(problem)
    pair = tasks(problem, [1, 1])
    update = method.local_update(worker, payload_of(method, state), pair)
    network = worker.network(method.local_plan(payload_of(method, state)).model)
    grads = [gradients(problem, network, state.tensors, task.rows[0])[1] for task in pair]
    for name, start in state.tensors.items():
        if method.on_client(name):
            for k in range(2):
                close(upload_of(update, k)[name], start - RATE * grads[k][name])
        else:
            mean = (grads[0][name] + grads[1][name]) / 2
            close(update.server[name], start - RATE * mean)


def test_in_turn_the_second_client_meets_what_the_server_learnt_from_the_first():
    problem, method = made("in_turn")
    state = warm_state(method)
    worker = runs.worker(problem)
    pair = tasks(problem, [1, 1])
    update = method.local_update(worker, payload_of(method, state), pair)
    network = worker.network(method.local_plan(payload_of(method, state)).model)
    params = dict(state.tensors)
    for k, task in enumerate(pair):
        _, grads = gradients(problem, network, params, task.rows[0])
        for name in grads:
            if method.on_client(name):
                close(upload_of(update, k)[name], params[name] - RATE * grads[name])
            else:
                params[name] = params[name] - RATE * grads[name]
    runs.close_tensors(update.server, {n: p for n, p in params.items() if not method.on_client(n)}, rtol=1e-5)


def test_a_server_copy_per_client_is_fedit():
    """Averaging both halves at the round's end is averaging the whole, with AdamW too."""
    split = runs.run(tiny.spec({**FAST, "method.server": "per_client"}, method="split-lora"))
    fedit = runs.run(tiny.spec(FAST))
    runs.close_tensors(split.state.tensors, fedit.state.tensors, rtol=1e-5)
    np.testing.assert_allclose(split.clients["train_loss"], fedit.clients["train_loss"], rtol=1e-6)


@pytest.mark.parametrize("server", ["concatenated", "in_turn", "per_client"])
def test_one_client_is_centralised_training(server: str):
    """Three rounds of SGD with one client: the cut model learns what FedIT's one client does (see test_fedavg)."""
    one = {**SGD, "fleet.num_clients": 1, "fleet.devices": {"jetson-nano": 1.0}, "rounds.clients_per_round": 1}
    split = runs.run(tiny.spec({**one, "method.server": server}, method="split-lora"))
    fedit = runs.run(tiny.spec(one))
    runs.same_tensors(split.state.tensors, fedit.state.tensors)


def test_the_cut_may_lie_anywhere():
    """Where the model is cut changes what crosses the link, not what one client learns."""
    one = {**SGD, "fleet.num_clients": 1, "fleet.devices": {"jetson-nano": 1.0}, "rounds.clients_per_round": 1}
    early, late = (runs.run(tiny.spec({**one, "method.split_point": c}, method="split-lora")) for c in (1, 3))
    runs.same_tensors(early.state.tensors, late.state.tensors)
    assert (3 * per_round(early) == per_round(late)).all()
    for cut in (0, 4):
        with pytest.raises(UserError) if cut else pytest.raises(ValueError, match="greater than 0"):
            runs.problem(tiny.spec({"method.split_point": cut}, method="split-lora"))


def per_round(done: runs.Finished) -> np.ndarray:
    """Uplink without what crossed the cut: 2 steps of 2 examples, padded per batch, 32 wide, and their labels."""
    sizes = np.diff(done.problem.inputs.train.offsets)
    steps, batch = done.problem.spec.local.steps, done.problem.spec.local.batch_size
    _, passed = runs.recorded(done.problem.spec)
    cut = []
    for one in passed:
        rows = one.unit.rows
        assert rows.shape == (steps, batch)
        cut.append(int(sizes[rows].max(axis=1).sum()) * batch * 4 * (32 + 1))
    return done.clients["uplink_bytes"].to_numpy() - np.array(cut)


def test_the_servers_moments_live_on_and_the_clients_do_not():
    """Four steps in two rounds: torch's AdamW, the client's made anew after two steps, the server's not."""
    problem, method = made("concatenated", **{"local.optimizer": "adamw", "local.learning_rate": 0.01})
    worker = runs.worker(problem)
    task = tasks(problem, [4])[0]
    state = warm_state(method)
    params = {name: t.clone().requires_grad_() for name, t in state.tensors.items()}
    network = worker.network(method.local_plan(payload_of(method, state)).model)
    server = torch.optim.AdamW([p for n, p in params.items() if not method.on_client(n)], lr=0.01, weight_decay=0.0)
    for round_idx in range(2):
        rows = task.rows[2 * round_idx : 2 * round_idx + 2]
        update = method.local_update(worker, payload_of(method, state), [replace(task, rows=rows)])
        state = method.aggregate(state, [Update(upload_of(update, 0), 1.0, (0,), update.server)], round_idx)

        client = torch.optim.AdamW([p for n, p in params.items() if method.on_client(n)], lr=0.01, weight_decay=0.0)
        for batch in rows:
            _, grads = gradients(problem, network, {n: p.detach() for n, p in params.items()}, batch)
            for name, grad in grads.items():
                params[name].grad = grad
            client.step()
            server.step()
    assert state.values["num_server_steps"] == 4
    adapter = method.evaluated(state, lambda: iter(())).adapter
    # AdamW's first steps blow up the rounding of what is nearly zero: a hundredth of a step, where forgotten moments cost halves.
    runs.close_tensors(adapter, {name: p.detach() for name, p in params.items()}, atol=1e-4)


def test_the_model_is_both_halves_and_nothing_else():
    """The server's AdamW moments are state, but no part of the adapter that is shipped."""
    done = runs.run(tiny.spec(FAST, method="split-lora"))
    assert any(name.startswith("adam.") for name in done.state.tensors)
    assert set(done.deployed.adapter) == set(done.problem.method.context.fresh_adapter())


def test_clients_with_fewer_steps_leave_the_cohort():
    """Three steps for client 1, one for client 0: bytes and tokens are each client's own."""
    problem, method = made("concatenated")
    pair = tasks(problem, [1, 3])
    update = method.local_update(runs.worker(problem), payload_of(method, warm_state(method)), pair)
    sizes = np.diff(problem.inputs.train.offsets)
    assert update.cut_bytes is not None
    for k, task in enumerate(pair):
        padded = 2 * int(sizes[task.rows].max(axis=1).sum())
        assert update.cut_bytes[:, k].tolist() == [padded * 4 * (32 + 1), padded * 4 * 32]
        assert update.num_tokens[k] == sizes[task.rows].sum()


@pytest.mark.parametrize("server", ["concatenated", "in_turn", "per_client"])
def test_what_fills_up_a_batch_crosses_no_cut(server: str):
    """Client 1 has one example of two places: the result is that of a batch of one, and so is what it sends and is charged."""
    problem, method = made(server)
    payload, worker = payload_of(method, warm_state(method)), runs.worker(problem)
    first, second = tasks(problem, [1, 1])
    short = replace(second, rows=np.array([[second.rows[0, 0], NO_EXAMPLE]]))
    update = method.local_update(worker, payload, [first, short])
    alone = method.local_update(worker, payload, [replace(second, rows=second.rows[:, :1])])
    assert update.cut_bytes is not None
    assert alone.cut_bytes is not None
    assert update.cut_bytes[:, 1].tolist() == alone.cut_bytes[:, 0].tolist()
    assert update.num_tokens[1] == alone.num_tokens[0]
    if server != "in_turn":  # there the server has learnt from client 0 before
        assert update.losses[1] == pytest.approx(alone.losses[0], rel=1e-5)
        runs.close_tensors(upload_of(update, 1), upload_of(alone, 0), rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_both_halves():
    """With dropout the first loss differs from the one without, and the same seed gives it again."""

    def first_loss(dropout: float) -> Tensor:
        problem, method = made("concatenated", **{"model.lora.dropout": dropout})
        state = warm_state(method)
        update = method.local_update(runs.worker(problem), payload_of(method, state), tasks(problem, [1]))
        return torch.tensor(update.losses)

    assert torch.equal(first_loss(0.0), first_loss(0.0))
    assert not torch.equal(first_loss(0.0), first_loss(0.5))
    assert torch.equal(first_loss(0.5), first_loss(0.5))
