"""DoFIT: averages within domains, and the step between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fleetune.errors import UserError
from fleetune.methods.base import ClientInfo, State, Update
from fleetune.methods.dofit import exchange
from fleetune.tensors import Tensors, add_weighted
from support import runs, tiny

FAST = {"evaluation.generate": False}


def domain_of(state: State, domain: int) -> Tensors:
    prefix = f"domain.{domain}."
    return {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}


def random_domains(count: int = 3, *, seed: int = 0) -> list[Tensors]:
    """Domains with five tensors each, whose norms fall from a to e by a factor of 2."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: 2.0**-i * torch.randn(4, 3, generator=generator) for i, name in enumerate("abcde")} for _ in range(count)
    ]


def test_the_step_of_two_domains():
    """G_0 = (3, 0), G_1 = (0, 4): m = (1.5, 2), so |G - m| = (1.5, 2) for both, of length 2.5. With sc = 5 the step is (3, 4):
    G_0 = (6, 4) and G_1 = (3, 8), away from the mean in one coordinate and towards it in the other."""
    domains = [{"x": torch.tensor([3.0, 0.0])}, {"x": torch.tensor([0.0, 4.0])}]
    new = exchange(domains, top_k=1, step=5.0, rule="perturb")
    assert [one["x"].tolist() for one in new] == [[6.0, 4.0], [3.0, 8.0]]
    assert domains[0]["x"].tolist() == [3.0, 0.0]


def test_the_mean_of_two_domains():
    """DoFIT-base: (3, 0) and (0, 4) both become (1.5, 2)."""
    domains = [{"x": torch.tensor([3.0, 0.0])}, {"x": torch.tensor([0.0, 4.0])}]
    new = exchange(domains, top_k=1, step=5.0, rule="mean")
    assert [one["x"].tolist() for one in new] == [[1.5, 2.0], [1.5, 2.0]]


def test_only_tensors_that_matter_to_every_domain_change():
    """Squared norms 9, 4, 1 against 4, 1, 9: of the two largest, {x, y} and {z, x}, only x is in both."""
    domains = [{"x": torch.tensor([3.0]), "y": torch.tensor([2.0]), "z": torch.tensor([1.0])}]
    domains += [{"x": torch.tensor([2.0]), "y": torch.tensor([1.0]), "z": torch.tensor([3.0])}]
    new = exchange(domains, top_k=2, step=0.5, rule="perturb")
    assert [{name: t.item() for name, t in one.items()} for one in new] == [
        {"x": 3.5, "y": 2.0, "z": 1.0},
        {"x": 2.5, "y": 1.0, "z": 3.0},
    ]


@pytest.mark.parametrize("step", [0.05, 1.0])
def test_every_shared_tensor_moves_by_the_step(step: float):
    domains = random_domains()
    for old, new in zip(domains, exchange(domains, top_k=3, step=step, rule="perturb"), strict=True):
        moved = {name: float((new[name] - old[name]).norm()) for name in old}
        assert moved == pytest.approx(dict.fromkeys("abc", step) | {"d": 0.0, "e": 0.0}, rel=1e-4)


def test_domains_that_agree_stay_as_they_are():
    """The formula is 0 / 0 there; so it is for the one of three domains that lies at the mean."""
    same = [{"x": torch.tensor([1.0, 2.0])} for _ in range(3)]
    for new in exchange(same, top_k=1, step=1.0, rule="perturb"):
        assert new["x"].tolist() == [1.0, 2.0]
    spread = [{"x": torch.tensor([value])} for value in (1.0, 2.0, 3.0)]
    assert [one["x"].item() for one in exchange(spread, top_k=1, step=1.0, rule="perturb")] == [2.0, 2.0, 4.0]


@pytest.mark.parametrize("rule", ["perturb", "mean"])
def test_nothing_shared_changes_nothing(rule: str):
    domains = random_domains()
    for old, new in zip(domains, exchange(domains, top_k=0, step=1.0, rule=rule), strict=True):
        runs.same_tensors(old, new)


def test_a_domain_averages_its_own_clients():
    """Clients of 1 and 3 examples in domain 0 send 1 and 3, one of 4 in domain 1 sends 10: (1 + 9) / 4 = 2.5, and 10. Domain 2
    has nobody and stays as it is."""
    made = runs.problem(tiny.spec({"method.top_k": 0, "method.domains": 3}, method="dofit")).method
    state = State({f"domain.{j}.x": torch.zeros(1) for j in range(3)})
    updates = [
        Update({"x": torch.tensor([1 / 8 + 9 / 8])}, 1.0, (0, 1), group=0, total_weight=0.5),  # a sum of p_k x_k
        Update({"x": torch.tensor([10.0])}, 0.5, (2,), group=1, total_weight=0.5),  # one client by itself
    ]
    after = made.aggregate(state, updates, 0)
    assert {name: t.item() for name, t in after.tensors.items()} == {
        "domain.0.x": 2.5,
        "domain.1.x": 10.0,
        "domain.2.x": 0.0,
    }
    assert state.tensors["domain.0.x"].item() == 0.0


def test_one_domain_is_fedit_bit_for_bit():
    """The same payloads, uploads, losses and bytes; only the names of state and evaluation have a domain in them."""
    dofit, sent = runs.recorded(tiny.spec({**FAST, "method.domains": 1}, method="dofit"))
    fedit, plainly_sent = runs.recorded(tiny.spec(FAST))
    runs.same_tensors(domain_of(dofit.state, 0), fedit.state.tensors)
    for one, other in zip(sent, plainly_sent, strict=True):
        runs.same_tensors(one.payloads[0].tensors, other.payloads[0].tensors)
        assert one.unit.client_ids.tolist() == other.unit.client_ids.tolist()
    for name in ("train_loss", "uplink_bytes", "downlink_bytes", "sim_seconds", "peak_memory_bytes"):
        assert dofit.clients[name].tolist() == fedit.clients[name].tolist(), name
    last = dofit.rounds.iloc[-1]
    assert last["eval_loss"] == last["eval_loss/domain_0"] == fedit.rounds["eval_loss"].iloc[-1]


def test_without_shared_tensors_every_domain_is_fedit_on_its_own_clients():
    """k = 0: after a round each domain holds the average over its own clients alone, weighted by their examples."""
    once = {**FAST, "rounds.num_rounds": 1, "rounds.clients_per_round": 6}
    done, passed = runs.recorded(tiny.spec({**once, "method.top_k": 0}, method="dofit"))
    part, categories = done.problem.partition, done.problem.inputs.train.categories
    worker, method = runs.worker(done.problem), done.problem.method
    sums: list[Tensors] = [{}, {}]
    num_examples = [0, 0]
    for one in passed:
        for cohort in one.unit.cohorts:
            for task in one.unit.tasks(cohort):
                shard = part.shard(task.client_id)
                domain = int(np.bincount(categories[shard]).argmax()) % 2
                upload = method.local_update(worker, one.payloads[cohort.payload], [task]).upload
                assert upload is not None
                add_weighted(sums[domain], upload.client(0), len(shard))
                num_examples[domain] += len(shard)
    assert all(num_examples)
    for j in (0, 1):
        mean = {name: t / num_examples[j] for name, t in sums[j].items()}
        runs.close_tensors(domain_of(done.state, j), mean, rtol=1e-4, atol=1e-5)


def test_a_client_belongs_to_the_domain_of_its_main_category():
    method = runs.problem(tiny.spec({"method.domains": 2}, method="dofit")).method
    groups = [method.group(ClientInfo(0, "jetson-nano", 1e9, 10, category)) for category in range(4)]
    assert groups == [0, 1, 0, 1]


def test_what_is_shipped_is_the_mean_of_the_domains():
    done = runs.run(tiny.spec({**FAST, "rounds.num_rounds": 1}, method="dofit"))
    a, b = (domain_of(done.state, j) for j in (0, 1))
    runs.close_tensors(done.deployed.adapter, {name: (a[name] + b[name]) / 2 for name in a})


@pytest.mark.parametrize(
    ("overrides", "told"), [({"method.domains": 7}, "fleet of 6 clients"), ({"method.domains": 5}, "4 categories")]
)
def test_more_domains_than_clients_or_categories_are_refused(overrides: dict[str, Any], told: str):
    with pytest.raises(UserError, match=told) as raised:
        runs.problem(tiny.spec(overrides, method="dofit"))
    assert raised.value.field == "method.domains"
