"""SplitFed: v1 is a copy of the server's half per client, v2 one half that serves clients in turn."""

from __future__ import annotations

import numpy as np

from fleetune.methods.sfl import SFL
from support import runs, tiny

SGD = {"evaluation.generate": False, "local.optimizer": "sgd", "local.learning_rate": 0.5}


def test_v1_is_split_lora_with_a_copy_per_client():
    """And so it is FedIT (test_split_lora): averaging both halves is averaging the whole."""
    first = runs.run(tiny.spec(SGD, method="sfl"))
    runs.same_tensors(
        first.state.tensors,
        runs.run(tiny.spec({**SGD, "method.server": "per_client"}, method="split-lora")).state.tensors,
    )


def test_v2_serves_clients_in_an_order_of_the_round():
    """One step of SGD: the client served last has met what the server learnt from the others; orders differ between rounds."""
    spec = tiny.spec({**SGD, "method.version": "v2", "rounds.num_rounds": 3, "local.steps": 1}, method="sfl")
    done, passed = runs.recorded(spec)
    method, worker = done.problem.method, runs.worker(done.problem)
    assert isinstance(method, SFL)
    orders = []
    for one in passed:
        (cohort,) = one.unit.cohorts
        tasks, payload = one.unit.tasks(cohort), one.payloads[cohort.payload]
        order = method.serving_order(tasks)
        orders.append([tasks[place].client_id for place in order])
        for place, task in enumerate(tasks):
            alone = method.local_update(worker, payload, [task]).losses[0]
            together = one.reply.losses[place]
            assert np.isclose(alone, together, rtol=1e-6) == (place == order[0])
    assert any(order != sorted(order) for order in orders)
