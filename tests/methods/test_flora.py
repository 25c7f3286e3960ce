"""FLoRA: the sum of products is exact, rounds begin anew, and who missed a stack is sent it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fleetune.errors import UserError
from fleetune.methods.base import Payload, State, Update, is_lora_a, is_lora_b
from fleetune.methods.flora import FLoRA
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.plan.walk import plan
from fleetune.pricing.pricing import Pricing
from fleetune.tensors import Stack, Tensors, num_bytes
from support import random_models as models
from support import runs, tiny

FAST = {"evaluation.generate": False}
SITE = "layers.0.self_attn.q_proj"
BYTES_PER_RANK = 4 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
"""fp32, 4 blocks, four linear layers of 32 x 32 and three of 32 x 48: sum of (in + out)."""
DENSE_BYTES = 4 * 4 * (4 * 32 * 32 + 3 * 32 * 48)


def method_of(overrides: dict[str, Any] | None = None) -> FLoRA:
    method = runs.problem(tiny.spec(overrides or {}, method="flora")).method
    assert isinstance(method, FLoRA)
    return method


def product(method: FLoRA, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    """What the server sums of one client's pair at one site."""
    upload = Stack.of([{f"{SITE}.lora_A": a, f"{SITE}.lora_B": b}])
    return method.summand(Payload({}), upload, []).client(0)


def test_the_sum_of_two_clients_products():
    """s = 4 / 2 = 2. Client 0, p = 1/4: A = (1 2), B = (1 0)', so 2 B A = (2 4; 0 0). Client 1, p = 3/4, of rank 2: A = I,
    B = (0 1; 1 0), so 2 B A = (0 2; 2 0). Their sum is (0.5 2.5; 1.5 0), and the stack has rank 3."""
    method = method_of()
    low = product(method, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]]))
    high = product(method, torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    updates = [Update(low, 0.25, (0,), ranks=(1,)), Update(high, 0.75, (1,), ranks=(2,))]
    after = method.aggregate(State({f"{SITE}.delta": torch.zeros(2, 2)}, {"stacked": []}), updates, 0)
    assert after.tensors[f"{SITE}.delta"].tolist() == [[0.5, 2.5], [1.5, 0.0]]
    assert after.values == {"stacked": [3]}
    assert method.columns(after) == {"stacked_rank": 3.0}


def test_the_product_of_the_stacked_factors_is_what_is_added():
    """[B_1 B_2 B_3] [p_1 s A_1; p_2 s A_2; p_3 s A_3] for ranks 1, 2 and 4, against the sum that workers and server form."""
    method, generator = method_of(), torch.Generator().manual_seed(0)
    weights, scaling = (0.2, 0.3, 0.5), method.context.lora.scaling
    pairs = [(torch.randn(r, 32, generator=generator), torch.randn(32, r, generator=generator)) for r in (1, 2, 4)]
    updates = [
        Update(product(method, a, b), p, (k,), ranks=(len(a),))
        for k, ((a, b), p) in enumerate(zip(pairs, weights, strict=True))
    ]
    start = torch.randn(32, 32, generator=generator)
    after = method.aggregate(State({f"{SITE}.delta": start}, {"stacked": [5]}), updates, 1)
    stacked_a = torch.cat([p * scaling * a for (a, _), p in zip(pairs, weights, strict=True)])
    stacked_b = torch.cat([b for _, b in pairs], dim=1)
    expected = start.double() + stacked_b.double() @ stacked_a.double()
    torch.testing.assert_close(after.tensors[f"{SITE}.delta"].double(), expected, rtol=1e-5, atol=1e-5)
    assert after.values == {"stacked": [5, 7]}


def test_the_engine_adds_the_products_of_clients_of_mixed_ranks():
    """sum_k p_k s B_k A_k of what each client comes to by itself, with ranks 1 and 2 in one round."""
    done, passed = runs.recorded(
        tiny.spec({**FAST, "rounds.num_rounds": 1, "rounds.clients_per_round": 6}, method="flora")
    )
    sizes = done.clients["shard_examples"]
    weights = dict(zip(done.clients["client_id"], sizes / sizes.sum(), strict=True))
    worker, method = runs.worker(done.problem), done.problem.method
    expected = {name: torch.zeros_like(t) for name, t in done.state.tensors.items()}
    for one in passed:
        for cohort in one.unit.cohorts:
            for task in one.unit.tasks(cohort):
                upload = method.local_update(worker, one.payloads[cohort.payload], [task]).upload
                assert upload is not None
                pairs = upload.client(0)
                for name in expected:
                    site = name.removesuffix(".delta")
                    ba = pairs[f"{site}.lora_B"] @ pairs[f"{site}.lora_A"]
                    expected[name] += weights[task.client_id] * method.context.lora.scaling * ba
    assert sorted(set(done.clients["rank"])) == [1, 2]
    assert done.rounds["stacked_rank"].tolist() == [done.clients["rank"].sum()]
    runs.close_tensors(done.state.tensors, expected, rtol=1e-4, atol=1e-6)


def test_one_client_adds_its_own_adapter():
    """With p = 1 the base gains s B A of that client, bit for bit."""
    one = {"fleet.num_clients": 1, "fleet.devices": {"jetson-nano": 1.0}, "rounds.clients_per_round": 1}
    done, passed = runs.recorded(tiny.spec({**FAST, **one, "rounds.num_rounds": 1}, method="flora"))
    unit, method = passed[0].unit, done.problem.method
    payload = passed[0].payloads[0]
    upload = method.local_update(runs.worker(done.problem), payload, unit.tasks(unit.cohorts[0])).upload
    assert upload is not None
    runs.same_tensors(done.state.tensors, method.summand(payload, upload, []).client(0))


def test_every_round_begins_with_fresh_pairs():
    """B = 0, and an A that is the same for all clients of a rank in a round and another one in the next."""
    done, passed = runs.recorded(tiny.spec(FAST, method="flora"))
    starts: dict[tuple[int, int], Tensors] = {}
    for one in passed:
        for cohort in one.unit.cohorts:
            start = done.problem.method.client_adapter(one.payloads[cohort.payload])
            assert not any(t.any() for name, t in start.items() if is_lora_b(name))
            key = (one.unit.round_idx, len(start[f"{SITE}.lora_A"]))
            runs.same_tensors(starts.setdefault(key, start), start)
    a = {key: next(t for name, t in start.items() if is_lora_a(name)) for key, start in starts.items()}
    rank = max(r for _, r in a)
    of_rank = [a[key] for key in sorted(a) if key[1] == rank]
    assert len(of_rank) > 1
    assert not torch.equal(of_rank[0], of_rank[1])


def test_what_is_shipped_computes_what_was_evaluated():
    """The base with all stacks added, and the base under the PEFT adapter that the run leaves behind: the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = runs.run(tiny.spec({**FAST, "local.learning_rate": 0.05}, method="flora"))
    base, lora = done.problem.inputs.base, done.problem.spec.model.lora
    network = Network(base, Submodel.prefix(base.num_layers), lora)
    ids = models.random_ids(2, 9)
    plain = network.logits(network.blocks(network.embed(ids)))
    network.hold(done.state.tensors)
    merged = network.logits(network.blocks(network.embed(ids)))
    model = AutoModelForCausalLM.from_pretrained(tiny.model_folder(), dtype=torch.float32)
    shipped = PeftModel.from_pretrained(model, str(done.run_dir.path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(shipped(ids).logits, merged, rtol=1e-5, atol=3e-5)
    assert float((plain - merged).detach().abs().max()) > 1e-3


def test_catching_up_costs_every_missed_stack_or_the_dense_sum_if_that_is_smaller():
    """Stacks of rank 6, 5, 2 and 8; a rank takes 7,936 bytes, the dense sum 139,264, as much as a rank of 17.5.

    Who has the first two lacks 2 + 8 = 10 ranks. Who has the first lacks 15; who has none lacks 21, and the dense sum is less.
    """
    made = runs.problem(tiny.spec(method="flora"))
    state = State(made.method.start().tensors, {"stacked": [6, 5, 2, 8]})
    payload, pricing = made.method.broadcast(state, 4, 2), Pricing(made)
    assert (BYTES_PER_RANK, DENSE_BYTES) == (7936, 139264)
    lacking = {last: pricing.provision_bytes(payload, last) for last in (None, "1", "2", "3", "4")}
    assert lacking == {None: DENSE_BYTES, "1": 15 * 7936, "2": 10 * 7936, "3": 8 * 7936, "4": 0}
    assert num_bytes(payload.tensors) == 0


def test_a_run_charges_each_client_for_the_stacks_since_its_last_round():
    done = runs.run(tiny.spec({**FAST, "rounds.num_rounds": 5, "evaluation.every": 5}, method="flora"))
    stacks: list[int] = []
    holds: dict[int, int] = {}
    for _, clients in done.clients.groupby("round"):
        for client, down in zip(clients["client_id"], clients["downlink_bytes"], strict=True):
            missed = sum(stacks[holds.get(client, 0) :])
            assert down == min(missed * BYTES_PER_RANK, DENSE_BYTES)
            holds[client] = len(stacks)
        stacks.append(int(clients["rank"].sum()))
    assert done.rounds["stacked_rank"].tolist() == stacks
    assert (done.clients["uplink_bytes"] == done.clients["rank"] * BYTES_PER_RANK).all()


def test_a_plan_has_the_bytes_of_the_run():
    spec = tiny.spec({**FAST, "rounds.num_rounds": 4, "evaluation.every": 4}, method="flora")
    run, planned = runs.run(spec), plan(spec)
    assert (run.rounds["num_ok"] == 3).all()
    for name in ("uplink_bytes", "downlink_bytes", "stacked_rank"):
        assert [row[name] for row in planned.rounds] == run.rounds[name].tolist(), name
    assert any(run.rounds["downlink_bytes"])


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_matrix_keeps_the_sum_beside_its_codes(quantization: str):
    """Every adapted layer gives what it gave before and x D' more, and its codes keep their bits."""
    base = runs.base_model(tiny.model_folder(), quantization)
    spec = tiny.spec()
    network = Network(base, Submodel.prefix(4), spec.model.lora)
    generator = torch.Generator().manual_seed(0)
    layer = network.sites[SITE]
    codes, x = layer.weight.clone(), torch.randn(1, 5, 32, generator=generator)
    delta = torch.randn(32, 32, generator=generator)
    before = layer(x)
    network.hold({f"{SITE}.delta": delta})
    torch.testing.assert_close(layer(x), before + x @ delta.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.weight, codes)
    network.hold({})
    assert torch.equal(layer(x), before)


def test_it_learns_on_a_quantised_base():
    done = runs.run(tiny.spec({**FAST, "model.quantization": "nf4", "local.steps": 4}, method="flora"))
    assert done.rounds["eval_loss"].iloc[-1] < done.events[0]["baseline"]["eval_loss"] - 0.1
    assert np.isfinite(done.rounds["train_loss"]).all()


def test_a_client_of_a_smaller_rank_by_its_budget_starts_with_a_smaller_pair():
    method = method_of()
    payload = method.narrowed(method.broadcast(method.start(), 0, 2), 1)
    assert {len(t) for name, t in method.client_adapter(payload).items() if is_lora_a(name)} == {1}
    runs.same_tensors(payload.held, method.start().tensors)


@pytest.mark.parametrize(
    ("ranks", "field", "told"),
    [
        ({"jetson-nano": 0}, "method.ranks.jetson-nano", "greater than or equal to 1"),
        ({"jetson-nan": 2}, "method.ranks", "did you mean 'jetson-nano'"),
        ({"jetson-nano": 33}, "method.ranks.jetson-nano", "exceeds 32"),
    ],
)
def test_ranks_that_no_client_can_have_are_refused(ranks: dict[str, int], field: str, told: str):
    with pytest.raises(UserError, match=told) as raised:
        runs.problem(tiny.spec({"method.ranks": ranks}, method="flora"))
    assert raised.value.field == field
