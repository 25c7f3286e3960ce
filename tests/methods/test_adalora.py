"""AdaLoRA: agreement with PEFT's own for one client, the budget's curve, the scores, and what is pruned and stays so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fleetune.data.batches import collate, draw_batches
from fleetune.errors import UserError
from fleetune.methods.adalora import AdaLoRA, largest
from fleetune.methods.base import State, Update
from fleetune.models.adapters import adds_nothing
from fleetune.models.peft_format import load_tensors
from fleetune.seeds import seed_of
from fleetune.spec import RunSpec
from fleetune.training.plan import ClientTask
from support import runs, tiny

FAST = {"evaluation.generate": False}
PRUNING = {
    **FAST,
    "model.lora.rank": 3,
    "rounds.num_rounds": 6,
    "method.target_rank": 1,
    "method.initial_fraction": 0.17,  # one round
    "method.final_fraction": 0.33,  # two rounds
}
ONE_CLIENT = {
    **PRUNING,
    "fleet.num_clients": 1,
    "fleet.devices": {"jetson-agx-orin-64gb": 1.0},
    "rounds.clients_per_round": 1,
    "data.partition": {"kind": "iid"},
    "local.optimizer": "sgd",
    "local.learning_rate": 0.5,
    "local.max_grad_norm": None,
    "method.orthogonal_weight": 0.5,
}


def made(**overrides: Any) -> AdaLoRA:
    """The method on the tiny model: 28 matrices of rank 2."""
    method = runs.problem(tiny.spec({**FAST, **overrides}, method="adalora")).method
    assert isinstance(method, AdaLoRA)
    return method


def in_peft(spec: RunSpec) -> dict[str, Tensor]:
    """PEFT's AdaLora on the same batches, with an allocation every ``local.steps`` steps (deltaT), as named tensors of ours.

    Importance is that of the weights that made the gradient, as in the paper's algorithm 1. PEFT's `update_and_allocate` goes
    with the weights after the step, so its parts are called here, each at its place.
    """
    from peft import AdaLoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    problem = runs.problem(spec)
    method, local, num_rounds = problem.method, spec.local, spec.rounds.num_rounds
    assert isinstance(method, AdaLoRA)
    rank, config = spec.model.lora.rank, method.config
    total, last = num_rounds * local.steps, method.final_rounds * local.steps
    adalora = AdaLoraConfig(
        task_type="CAUSAL_LM",  # without it PEFT's model passes the orthogonality term by
        init_r=rank,
        target_r=config.target_rank,
        tinit=method.initial_rounds * local.steps,
        tfinal=last,
        deltaT=local.steps,
        beta1=config.beta1,
        beta2=config.beta2,
        orth_reg_weight=config.orthogonal_weight,
        total_step=total,
        lora_alpha=spec.model.lora.alpha * (rank + 1e-5) / rank,  # PEFT divides by r + 1e-5
        target_modules=sorted(spec.model.lora.target_names),
    )
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.model_folder()), adalora)
    ours = {
        name.removeprefix("base_model.model.model.").removesuffix(".default"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, tensor in method.start().tensors.items():
            ours[name].copy_(tensor.view_as(ours[name]))
    optimizer, allocator = torch.optim.SGD(ours.values(), lr=local.learning_rate), model.base_model.rankallocator
    step, pattern = 0, None
    for round_idx in range(num_rounds):
        seed = seed_of(spec.seed, "batches", round_idx, 0)
        shard = problem.partition.shard(0)
        for rows in draw_batches(shard, num_steps=local.steps, batch_size=local.batch_size, seed=seed):
            ids, labels = (torch.from_numpy(array) for array in collate(problem.inputs.train, rows))
            model(input_ids=ids, labels=labels).loss.backward()
            allocator.update_ipt(model)
            optimizer.step()
            step += 1
            budget, is_due = allocator.budget_schedule(step)
            if step > total - last:
                allocator.mask_using_rank_pattern(model, pattern)
            elif is_due:
                pattern = allocator.mask_to_budget(model, budget)
            optimizer.zero_grad()
    return {name: tensor.detach().view(-1) if "lora_E" in name else tensor.detach() for name, tensor in ours.items()}


def test_one_client_agrees_with_peft():
    """Six rounds of two steps: one without pruning, three allocations, two with a fixed set. All that differs is rounding."""
    spec = tiny.spec(ONE_CLIENT, method="adalora")
    done = runs.run(spec)
    assert done.state.values["triplets"] == 28
    expected = in_peft(spec)
    for name, tensor in done.state.tensors.items():
        assert torch.equal(tensor == 0, expected[name] == 0), name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_budget_falls_with_the_third_power():
    """28 matrices from rank 2 to 1 over 10 rounds, of which the first and the last three prune nothing: 6 are left.

    After 4 rounds half of them are over: 28 + 28 (1 - 1/2)^3 = 31.5, and 31 are kept.
    """
    method = made(**{"rounds.num_rounds": 10, "method.initial_fraction": 0.1, "method.final_fraction": 0.3})
    assert [method.budget(n) for n in (0, 1, 4, 7, 10)] == [56, 56, 31, 28, 28]


def test_a_run_keeps_as_many_triplets_as_the_budget_says_and_fixes_them():
    """Three clients a round: every round of the table has its budget, and the last two have the same triplets."""
    done = runs.run(tiny.spec({**PRUNING, "evaluation.every": 6}, method="adalora"))
    budgets = [done.problem.method.budget(n) for n in range(1, 7)]  # type: ignore[attr-defined]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == 84
    assert budgets[-3:] == [28, 28, 28]
    assert done.rounds["budget"].tolist() == done.rounds["triplets"].tolist() == budgets
    uplink = (done.rounds["uplink_bytes"] / done.rounds["num_ok"]).tolist()
    assert uplink[-3] - uplink[-1] == 84 * 4  # once the set is fixed, no scores go up


def test_without_pruning_it_is_fedavg_of_three_factors():
    """A target of the full rank: E is the clients' mean, whatever their scores are, and nothing is held at 0 in the end."""
    method = made(**{"method.target_rank": 2})
    state = method.start()
    payload = method.broadcast(state, 0, None)
    uploads = method.local_plan(payload).uploads
    start = {name: t for name, t in method.client_adapter(payload).items() if uploads(name)}
    updates = [
        Update({name: torch.full_like(t, float(client)) for name, t in start.items()}, weight, (client,))
        for client, weight in ((0, 0.25), (1, 0.75))
    ]
    after = method.aggregate(state, updates, 2)
    assert after.tensors.keys() == state.tensors.keys()
    assert all((tensor == 0.75).all() for tensor in after.tensors.values())
    assert after.values == {"budget": 56, "triplets": 56, "is_fixed": True}


def test_once_the_set_is_fixed_newcomers_and_others_train_together():
    """A client that has kept averages and one that never took part make one stack, and keep nothing more."""
    problem = runs.problem(tiny.spec(FAST, method="adalora"))
    method, rows = problem.method, np.arange(4).reshape(2, 2)
    state = method.start()
    first, last = (
        method.broadcast(replace(state, values={**state.values, "is_fixed": is_fixed}), 2, None)
        for is_fixed in (False, True)
    )
    kept = {name: t for name, t in method.client_adapter(first).items() if method.local_plan(first).keeps(name)}
    tasks = [ClientTask(0, 0.5, rows, 0.01, (0, 2), private=kept), ClientTask(1, 0.5, rows, 0.01, (0, 2))]
    update = method.local_update(runs.worker(problem), last, tasks)
    assert kept
    assert update.private is None
    assert update.upload is not None
    assert update.upload.shapes.keys() == state.tensors.keys()


def test_the_largest_scores_of_all_matrices_are_kept():
    """Of 3, 1 and 2, 5 the two largest are 5 and 3; of equal ones the first counts."""
    keep = largest({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 5.0])}, 2)
    assert {name: flags.tolist() for name, flags in keep.items()} == {"a": [True, False], "b": [False, True]}
    tied = largest({"a": torch.zeros(2), "b": torch.zeros(2)}, 3)
    assert {name: flags.tolist() for name, flags in tied.items()} == {"a": [True, True], "b": [True, False]}


def test_importance_is_smoothed_twice_and_summed_over_a_triplet():
    """With both decays 1/2 and from 0: w g = 6 gives I = 6, Ibar = 3, U = |6 - 3| / 2 = 3/2, so s = 9/2.

    E has w g = 6, A two entries of 6 and 0, B one of 2: s = 9/2; (9/2 + 0) / 2 = 9/4; Ibar = 1, U = 1/2, s = 1/2. Sum 29/4.
    A second step with the same numbers: I = 6, Ibar = 9/2, U = 3/4 + 3/4 = 3/2, so s(E) = 27/4.
    """
    method = made(**{"method.beta1": 0.5, "method.beta2": 0.5})
    trained = {"x.lora_A": [[[2.0, 3.0]]], "x.lora_E": [[-3.0]], "x.lora_B": [[[1.0]]]}
    grads = {"x.lora_A": [[[3.0, 0.0]]], "x.lora_E": [[2.0]], "x.lora_B": [[[2.0]]]}
    tensors, gradients = ({name: torch.tensor(value) for name, value in part.items()} for part in (trained, grads))
    kept = {f"{n}_{kind}": torch.zeros_like(t) for n, t in tensors.items() for kind in ("importance", "uncertainty")}
    kept["x.lora_score"] = torch.zeros(1, 1)
    method._score(tensors, gradients, kept, 0)
    assert kept["x.lora_score"].item() == pytest.approx(29 / 4)
    method._score(tensors, gradients, kept, 1)
    assert (kept["x.lora_E_importance"] * kept["x.lora_E_uncertainty"]).item() == pytest.approx(27 / 4)


def test_the_orthogonality_term_is_the_mean_over_matrices():
    """A = [[1, 0], [1, 0]]: A A^T - I = [[0, 1], [1, 0]], norm sqrt 2. B = I: norm 0. Mean sqrt 2 / 2, times 0.1."""
    method = made()
    params = {"x.lora_A": torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), "x.lora_B": torch.eye(2)[None]}
    params["x.lora_E"] = torch.ones(1, 2)  # takes no part
    torch.testing.assert_close(method._not_orthogonal(params, {}), torch.tensor([0.1 * 2**0.5 / 2]))


def test_the_shipped_adapter_is_made_of_pairs():
    done = runs.run(tiny.spec(FAST, method="adalora"))
    shipped, state = load_tensors(done.run_dir.path / "adapter"), done.state.tensors
    assert {name.rpartition(".")[2] for name in shipped} == {"lora_A", "lora_B"}
    site = "layers.1.mlp.up_proj"
    product = state[f"{site}.lora_B"] * state[f"{site}.lora_E"] @ state[f"{site}.lora_A"]
    torch.testing.assert_close(shipped[f"{site}.lora_B"] @ shipped[f"{site}.lora_A"], product)


def test_an_untrained_third_factor_adds_nothing():
    adapter = made().start().tensors
    assert adds_nothing(adapter)
    site = "layers.1.mlp.up_proj"
    assert not adds_nothing({**adapter, f"{site}.lora_E": torch.tensor([0.0, 1.0])})
    assert not adds_nothing({name: t for name, t in adapter.items() if name != f"{site}.lora_E"})


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"method.target_rank": 0}, "method.target_rank"),
        ({"method.target_rank": 3}, "method.target_rank"),
        ({"method.initial_fraction": 0.5, "method.final_fraction": 0.5}, "method.initial_fraction"),
        ({"method.final_fraction": 1.0}, "method.initial_fraction"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(overrides: dict[str, Any], field: str):
    with pytest.raises(UserError) as refused:
        runs.problem(tiny.spec({**FAST, **overrides}, method="adalora")).method.check()
    assert refused.value.field == field


def test_the_plan_knows_the_budget():
    """On tensors without data, the column of each round is the run's."""
    from fleetune.plan.walk import plan

    spec = tiny.spec(PRUNING, method="adalora")
    done, planned = runs.run(spec), plan(spec, hints=False)
    for name in ("budget", "triplets", "uplink_bytes", "downlink_bytes"):
        assert [row[name] for row in planned.rounds] == done.rounds[name].tolist()


def test_a_round_of_nobody_allocates_nothing():
    method = made()
    state = State(method.start().tensors, method.start().values)
    assert method.expected(state, [], 2) is state
