"""The shared trainer: a cohort's loss, and a plan carried out for clients stacked or alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fleetune.data.batches import IGNORED, NO_EXAMPLE, collate
from fleetune.methods.base import is_lora_a, is_lora_b
from fleetune.models.config import LoRAConfig
from fleetune.models.model import Model
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.problem import Problem
from fleetune.tensors import Tensors
from fleetune.training.loss import cohort_loss
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.trainer import train_cohort
from support import random_models as models
from support import runs, tiny

WHOLE = LocalPlan(Model(Submodel.prefix(4)))
ROWS = np.arange(24).reshape(4, 3, 2)


def network_of(architecture: str) -> Network:
    base = models.base_of(architecture)
    return Network(base, Submodel.prefix(base.num_layers), LoRAConfig(rank=2))


def task(client_id: int, rows: np.ndarray, *, rate: float = 0.01, private: Tensors | None = None) -> ClientTask:
    return ClientTask(client_id, 1.0, rows, rate, address=(client_id, 0), private=private)


def world(**overrides: object) -> tuple[Problem, Tensors]:
    """The tiny problem and an adapter whose B is not zero."""
    problem = runs.problem(tiny.spec(overrides))
    return problem, models.random_adapter(problem.inputs.base, problem.spec.model.lora)


def train(problem: Problem, start: Tensors, tasks: list[ClientTask], plan: LocalPlan = WHOLE) -> CohortUpdate:
    network = runs.worker(problem).network(plan.model)
    return train_cohort(network, plan, start, tasks, data=problem.inputs.train, local=problem.spec.local)


def upload_of(update: CohortUpdate, k: int = 0) -> Tensors:
    assert update.upload is not None
    return update.upload.client(k)


def test_the_loss_of_each_client_is_plain_cross_entropy_over_its_tokens():
    """Two clients with 2 examples of 6 tokens, of which 7 and 2 count: shifted cross-entropy of each by itself."""
    network = network_of("llama")
    ids = models.random_ids(4, 6)
    labels = ids.clone()
    labels[0, :2], labels[1, 4:], labels[2], labels[3, :4] = IGNORED, IGNORED, IGNORED, IGNORED
    h = network.blocks(network.embed(ids)).detach().requires_grad_()
    losses, counts = cohort_loss(network, h, labels, 2)
    assert counts.tolist() == [7, 2]
    logits = models.reference("llama")(ids).logits
    for k in range(2):
        mine = slice(2 * k, 2 * k + 2)
        expected = torch.nn.functional.cross_entropy(
            logits[mine, :-1].flatten(0, 1), labels[mine, 1:].flatten(), ignore_index=IGNORED
        )
        torch.testing.assert_close(losses[k], expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_loss_of_one_client_has_no_gradient_for_another():
    network = network_of("llama")
    ids = models.random_ids(4, 5)
    h = network.blocks(network.embed(ids)).detach().requires_grad_()
    cohort_loss(network, h, ids, 2)[0][0].backward()
    assert h.grad is not None
    assert h.grad[:2].any()
    assert not h.grad[2:].any()


def test_a_client_without_counted_tokens_has_loss_zero():
    network = network_of("llama")
    ids = models.random_ids(2, 5)
    losses, counts = cohort_loss(network, network.embed(ids), torch.full_like(ids, IGNORED), 2)
    assert losses.tolist() == [0.0, 0.0]
    assert counts.tolist() == [0, 0]


def test_one_client_is_a_plain_torch_loop():
    """Three steps of torch's AdamW with clipped gradients, over transformers' own loss on the same batches."""
    problem, start = world()
    update = train(problem, start, [task(0, ROWS[0])])
    base = problem.inputs.base
    network = Network(base, WHOLE.submodel, problem.spec.model.lora)
    leaves = {name: t.clone().requires_grad_() for name, t in start.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=0.01, weight_decay=0.0)
    losses = []
    for rows in ROWS[0]:
        ids, labels = (torch.from_numpy(a) for a in collate(problem.inputs.train, rows))
        network.set_adapter({name: leaf[None] for name, leaf in leaves.items()})
        logits = network.logits(network.blocks(network.embed(ids)))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), 1.0)
        optimizer.step()
        losses.append(loss.item())
    runs.close_tensors(upload_of(update), {n: leaf.detach() for n, leaf in leaves.items()}, rtol=1e-4, atol=1e-5)
    assert update.losses[0] == pytest.approx(np.mean(losses), rel=1e-5)
    lengths = problem.inputs.train.lengths
    assert update.num_tokens[0] == lengths[ROWS[0]].sum()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clients_with_different_steps_and_rates_agree_with_each_alone(optimizer: str):
    """1, 3 and 2 steps with rates of their own, in one stack and one by one."""
    problem, start = world(**{"local.optimizer": optimizer})
    tasks = [task(k, ROWS[k][:n], rate=0.01 * (k + 1)) for k, n in enumerate((1, 3, 2))]
    together = train(problem, start, tasks)
    for k in range(3):
        alone = train(problem, start, tasks[k : k + 1])
        runs.close_tensors(upload_of(together, k), upload_of(alone), rtol=1e-4, atol=1e-5)
        assert together.losses[k] == pytest.approx(alone.losses[0], rel=1e-5)
        assert together.num_tokens[k] == alone.num_tokens[0]


def test_a_short_batch_is_a_batch_of_fewer_examples():
    """Clients of 2 + 1, 1 and 2 + 2 examples in one stack, filled up: each comes to what plain batches alone give."""
    problem, start = world()
    filled = [np.array([[0, 1], [2, NO_EXAMPLE]]), np.array([[3, NO_EXAMPLE]]), np.array([[4, 5], [6, 7]])]
    together = train(problem, start, [task(k, rows) for k, rows in enumerate(filled)])
    for k, rows in enumerate(filled):
        batches = [row[row != NO_EXAMPLE] for row in rows]
        alone = train(problem, start, [task(k, batches)])  # type: ignore[arg-type]
        runs.close_tensors(upload_of(together, k), upload_of(alone), rtol=1e-4, atol=1e-5)
        assert together.losses[k] == pytest.approx(alone.losses[0], rel=1e-5)
        assert together.num_tokens[k] == alone.num_tokens[0]
    exact = train(problem, start, [task(1, filled[1])])
    runs.same_tensors(upload_of(exact), upload_of(train(problem, start, [task(1, filled[1][:, :1])])))


def test_only_trainable_tensors_change():
    """With B alone trainable A keeps its bits, and the other way round; the start is not written to."""
    problem, start = world()
    before = {name: t.clone() for name, t in start.items()}
    for trainable, frozen in ((is_lora_a, is_lora_b), (is_lora_b, is_lora_a)):
        upload = upload_of(train(problem, start, [task(0, ROWS[0])], replace(WHOLE, trainable=trainable)))
        assert all(torch.equal(upload[name], before[name]) == frozen(name) for name in before)
    runs.same_tensors(start, before)


def test_what_is_kept_comes_back_and_what_is_private_goes_in():
    """A client starts from the shared tensors with its own laid over them, and gets its own back."""
    problem, start = world()
    plan = replace(WHOLE, uploads=is_lora_a, keeps=is_lora_b)
    mine = {name: 2.0 * t for name, t in start.items() if is_lora_b(name)}
    update = train(problem, start, [task(0, ROWS[0], private=mine), task(1, ROWS[1])], plan)
    alone = [train(problem, {**start, **mine}, [task(0, ROWS[0])]), train(problem, start, [task(1, ROWS[1])])]
    assert update.private is not None
    for k in range(2):
        expected = upload_of(alone[k])
        both = {**upload_of(update, k), **update.private.client(k)}
        runs.close_tensors(both, {name: expected[name] for name in both}, rtol=1e-4, atol=1e-5)
    assert set(upload_of(update)) == set(filter(is_lora_a, start))
    assert set(update.private.client(0)) == set(filter(is_lora_b, start))
    assert train(problem, start, [task(0, ROWS[0])]).private is None


def test_no_adapter_is_left_in_the_network():
    """The network is scratch space: after a cohort it is the base model again."""
    problem, start = world()
    network = runs.worker(problem).network(WHOLE.model)
    ids = torch.arange(1, 9)[None]
    before = network.blocks(network.embed(ids))
    train_cohort(network, WHOLE, start, [task(0, ROWS[0])], data=problem.inputs.train, local=problem.spec.local)
    assert torch.equal(network.blocks(network.embed(ids)), before)


def test_dropout_draws_at_the_clients_address():
    """The same address gives the same loss, another round another, and evaluation does not drop anything."""
    problem, start = world(**{"model.lora.dropout": 0.3})
    first, second = task(0, ROWS[0]), replace(task(0, ROWS[0]), address=(0, 9))
    losses = [train(problem, start, [t]).losses[0] for t in (first, first, second)]
    assert losses[0] == losses[1] != losses[2]
    network = runs.worker(problem).network(WHOLE.model)
    network.set_adapter({name: t[None] for name, t in start.items()})
    ids = torch.arange(1, 9)[None]
    assert torch.equal(network.blocks(network.embed(ids)), network.blocks(network.embed(ids)))


def test_clients_that_worked_alone_join_to_a_cohort():
    problem, start = world()
    tasks = [task(k, ROWS[k]) for k in range(2)]
    parts = [train(problem, start, [t]) for t in tasks]
    joined = CohortUpdate.joined(parts)
    for k in range(2):
        runs.same_tensors(upload_of(joined, k), upload_of(parts[k]))
    assert joined.losses.tolist() == [float(p.losses[0]) for p in parts]
    assert joined.private is None
