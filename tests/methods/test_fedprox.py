"""FedProx: the pull towards the global adapter."""

from __future__ import annotations

from dataclasses import replace

import torch

from fleetune.training.trainer import train_cohort
from support import runs, tiny

FAST = {"evaluation.generate": False}


def test_mu_zero_is_fedavg_bit_for_bit():
    prox = runs.run(tiny.spec({**FAST, "method.mu": 0.0}, method="fedprox"))
    runs.same_runs(prox, runs.run(tiny.spec(FAST, method="fedavg")))


def test_mu_above_zero_is_not():
    prox = runs.run(tiny.spec({**FAST, "method.mu": 1.0}, method="fedprox"))
    plain = runs.run(tiny.spec(FAST, method="fedavg"))
    assert not torch.equal(*(r.state.tensors["layers.0.self_attn.q_proj.lora_B"] for r in (prox, plain)))


def test_the_penalty_of_two_clients():
    """mu = 2, client 0 away by (1, 2) and client 1 by (0, 3): 2 / 2 * (1 + 4) = 5 and 2 / 2 * 9 = 9."""
    method = runs.problem(tiny.spec({"method.mu": 2.0}, method="fedprox")).method
    start = {"a": torch.zeros(2, 1), "b": torch.ones(2, 1, 1)}
    params = {"a": torch.tensor([[1.0], [0.0]]), "b": torch.tensor([[[3.0]], [[4.0]]])}
    penalty = method.local_plan(method.broadcast(method.start(), 0, None)).penalty
    assert penalty is not None
    assert penalty(params, start).tolist() == [5.0, 9.0]


def test_the_gradient_gains_mu_times_the_distance():
    """SGD from theta_0: step 1 is FedAvg's; step 2's is FedAvg's from theta_1 and lr mu (theta_1 - theta_0) less."""
    sgd = {"local.optimizer": "sgd", "local.learning_rate": 0.5, "local.max_grad_norm": None}
    made = runs.problem(tiny.spec({**sgd, "method.mu": 0.5}, method="fedprox"))
    payload = made.method.broadcast(made.method.start(), 0, None)
    plan = made.method.local_plan(payload)
    _, passed = runs.recorded(tiny.spec({**FAST, "rounds.num_rounds": 1}))
    task = passed[0].unit.tasks(passed[0].unit.cohorts[0])[0]
    network = runs.worker(made).network(plan.model)

    def train(plan, start, rows):
        upload = train_cohort(
            network, plan, start, [replace(task, rows=rows, learning_rate=0.5)], data=made.inputs.train, local=local
        ).upload
        assert upload is not None
        return {name: t.clone() for name, t in upload.client(0).items()}

    local, plain = made.spec.local, replace(plan, penalty=None)
    theta_0 = payload.tensors
    theta_1 = train(plain, theta_0, task.rows[:1])
    theta_2 = train(plain, theta_1, task.rows[1:])
    expected = {name: theta_2[name] - 0.5 * 0.5 * (theta_1[name] - theta_0[name]) for name in theta_0}
    runs.close_tensors(train(plan, theta_0, task.rows), expected, atol=1e-6)
    assert not torch.allclose(expected["layers.3.mlp.down_proj.lora_B"], theta_2["layers.3.mlp.down_proj.lora_B"])
