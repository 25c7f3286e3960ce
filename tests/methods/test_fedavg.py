"""FedAvg and FedIT: one client is centralised training, and the mean is weighted by examples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fleetune.data.batches import collate, draw_batches
from fleetune.methods.base import State, Update
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.seeds import seed_of
from fleetune.spec import RunSpec
from fleetune.training.loss import cohort_loss
from support import runs, tiny

SGD = {"local.optimizer": "sgd", "local.learning_rate": 0.5, "local.max_grad_norm": None, "evaluation.generate": False}
ONE_CLIENT = {
    **SGD,
    "fleet.num_clients": 1,
    "fleet.devices": {"jetson-agx-orin-64gb": 1.0},
    "rounds.clients_per_round": 1,
    "data.partition": {"kind": "iid"},
}


def centralised(spec: RunSpec) -> dict[str, Tensor]:
    """A plain loop over one model and all data: p <- p - lr g, with the batches of client 0."""
    made = runs.problem(spec)
    base = made.inputs.base
    network = Network(base, Submodel.prefix(base.num_layers), spec.model.lora)
    params = made.method.context.fresh_adapter()
    for round_idx in range(spec.rounds.num_rounds):
        batches = draw_batches(
            made.partition.shard(0),
            num_steps=spec.local.steps,
            batch_size=spec.local.batch_size,
            seed=seed_of(spec.seed, "batches", round_idx, 0),
        )
        for rows in batches:
            ids, labels = (torch.from_numpy(a) for a in collate(made.inputs.train, rows))
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            network.set_adapter({name: leaf[None] for name, leaf in leaves.items()})
            loss, _ = cohort_loss(network, network.blocks(network.embed(ids)), labels, 1)
            grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
            params = {n: p - spec.local.learning_rate * g for (n, p), g in zip(params.items(), grads, strict=True)}
    return params


def test_one_client_is_centralised_training_bit_for_bit():
    """Three rounds of plain SGD on one client are six steps of one loop."""
    spec = tiny.spec(ONE_CLIENT, method="fedavg")
    runs.same_tensors(runs.run(spec).state.tensors, centralised(spec))


def test_fedavg_and_fedit_are_one_rule():
    fedavg, fedit = (runs.run(tiny.spec({"evaluation.generate": False}, method=name)) for name in ("fedavg", "fedit"))
    runs.same_runs(fedavg, fedit)


def test_the_mean_is_weighted_by_examples():
    """Uploads 1 and 3 of clients with 1 and 3 examples: (1 * 1 + 3 * 3) / 4 = 2.5."""
    method = runs.problem(tiny.spec(method="fedavg")).method
    state = State({"x": torch.zeros(1)})
    updates = [Update({"x": torch.tensor([1.0])}, 0.25, (0,)), Update({"x": torch.tensor([3.0])}, 0.75, (1,))]
    assert method.aggregate(state, updates, 0).tensors["x"].tolist() == [2.5]
    assert state.tensors["x"].tolist() == [0.0]


def test_the_engine_weights_clients_by_their_examples():
    """The new state is sum_k n_k u_k / sum n of what each sampled client comes to by itself."""
    done, passed = runs.recorded(tiny.spec({"rounds.num_rounds": 1, "evaluation.generate": False}))
    clients = done.clients
    weights = dict(zip(clients["client_id"], clients["shard_examples"] / clients["shard_examples"].sum(), strict=True))
    worker, method = runs.worker(done.problem), done.problem.method
    expected: dict[str, Tensor] = {}
    for one in passed:
        for cohort in one.unit.cohorts:
            for task in one.unit.tasks(cohort):
                update = method.local_update(worker, one.payloads[cohort.payload], [task]).upload
                assert update is not None
                for name, tensor in update.client(0).items():
                    expected[name] = expected.get(name, 0.0) + weights[task.client_id] * tensor
    assert len(set(weights.values())) > 1
    runs.close_tensors(done.state.tensors, expected, rtol=1e-4, atol=1e-5)


def test_an_uplink_is_the_adapter():
    """Rank 2 on the 7 linear layers of 4 blocks of width 32, feed-forward 48, in fp32."""
    done = runs.run(tiny.spec({"evaluation.generate": False, "rounds.num_rounds": 1}))
    elements = 4 * 2 * (4 * (32 + 32) + 3 * (32 + 48))
    assert np.unique(done.clients["uplink_bytes"]).tolist() == [4 * elements]
