"""Centralised training: one loop over all data, on the server alone, beside FedIT on one client."""

from __future__ import annotations

import numpy as np
import pytest

from fleetune.engine.launch.resolve import resolve_execution
from fleetune.engine.round.planner import RoundPlanner
from fleetune.models.network import Network
from fleetune.plan.summary import by_stage
from fleetune.plan.walk import plan
from fleetune.problem.pooled import server_alone
from fleetune.training.plan import ClientTask, LocalPlan
from fleetune.training.trainer import train_cohort
from support import runs, tiny

FAST = {"evaluation.generate": False}
SGD = {**FAST, "local.optimizer": "sgd", "local.learning_rate": 0.5, "local.max_grad_norm": None}


def test_with_sgd_it_is_fedit_on_one_client_that_holds_everything():
    """Bit for bit: the same batches, and no moments that a federation would lose between rounds."""
    alone = {"fleet.num_clients": 1, "fleet.devices": {"server-a100": 1.0}, "rounds.clients_per_round": 1}
    fedit = runs.run(tiny.spec({**SGD, **alone, "data.partition": {"kind": "iid"}, "local.steps": 6}))
    done = runs.run(tiny.spec(SGD, method="centralized"))  # 3 clients a round, 2 steps each
    runs.same_tensors(done.state.tensors, fedit.state.tensors)
    for name in ("train_loss", "eval_loss"):
        assert done.rounds[name].iloc[-1] == fedit.rounds[name].iloc[-1]
    assert done.events[0]["baseline"] == fedit.events[0]["baseline"]
    measured = ["flops", "num_examples", "num_tokens", "compute_seconds", "optimizer_bytes"]
    assert done.clients[measured].equals(fedit.clients[measured])


def test_the_rounds_are_one_loop_of_adamw():
    """Three rounds of six steps leave the bits of eighteen steps with one optimizer."""
    spec = tiny.spec(FAST, method="centralized")
    done = runs.run(spec)
    problem = done.problem
    planner, base = RoundPlanner(problem), problem.inputs.base
    rows = np.concatenate([planner.batches(round_idx, np.array([0]))[0] for round_idx in range(3)])
    assert rows.shape == (18, 2)
    plan = LocalPlan(problem.method.context.whole_model)
    network = Network(base, plan.submodel, spec.model.lora)
    task = ClientTask(0, 1.0, rows, spec.local.learning_rate, (0, 0))
    start = problem.method.context.fresh_adapter()
    once = train_cohort(network, plan, start, [task], data=problem.inputs.train, local=spec.local)
    assert once.upload is not None
    runs.same_tensors(done.deployed.adapter, once.upload.client(0))
    assert done.state.values == {"num_server_steps": 18}


def test_the_server_works_alone_on_all_examples():
    """As many steps as three clients take; nothing over a link; the federation's own rules do not touch it."""
    rules = {"fleet.dropout": 0.9, "rounds.close": "deadline", "rounds.deadline_seconds": 1e-6}
    limits = {
        "fleet.availability": {"kind": "bernoulli", "probability": 0.01},
        "fleet.budgets": {"joules_per_round": 1e-9},
    }
    done = runs.run(tiny.spec({**FAST, **rules, **limits}, method="centralized"))
    clients = done.clients
    assert clients["device"].tolist() == ["server-a100"] * 3
    assert clients["status"].tolist() == ["ok"] * 3
    assert clients["num_examples"].tolist() == [3 * 2 * 2] * 3
    assert set(clients["shard_examples"]) == {len(done.problem.inputs.keys)}
    assert not clients[["uplink_bytes", "downlink_bytes", "uplink_seconds", "downlink_seconds"]].to_numpy().any()
    assert clients[["flops", "compute_seconds", "energy_joules"]].to_numpy().all()
    assert done.rounds["sim_seconds"].tolist() == pytest.approx(clients["sim_seconds"].cumsum().tolist())


def test_epochs_see_as_many_examples_as_the_clients_of_a_round_do():
    """Three of six clients see half of all examples in a pass, so two passes of each are one over all."""
    alone = server_alone(tiny.spec({"local.epochs": 2.0}, method="centralized"))
    assert alone.local.epochs == 1.0
    assert alone.local.passes(112) == [(112, 1)]


def test_one_worker_is_enough():
    spec = tiny.spec({"execution": "auto"}, method="centralized")
    chosen = resolve_execution(spec, node_cores=[8], node_gpus=[0]).execution
    assert (chosen.workers, chosen.cohort, chosen.kind) == (1, 1, "serial")


def test_its_plan_names_the_server_and_has_the_costs_of_the_run():
    spec = tiny.spec(FAST, method="centralized")
    done, planned = runs.run(spec), plan(spec)
    for name in ("sim_seconds", "energy_joules", "peak_memory_bytes_max"):
        assert [row[name] for row in planned.rounds] == done.rounds[name].tolist()
    assert [row["device"] for row in by_stage(planned)] == ["server-a100"]
