"""SmartFed: algorithm 1 against values worked out by hand, importances against slopes, and the sizes of its routers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fleetune.cost.polynomials import BASIS
from fleetune.methods.expert_quotas import elastic_quotas
from fleetune.models.architectures import architecture
from fleetune.models.peft_format import CONFIG, WEIGHTS
from fleetune.pricing.mapping import CostedModel
from fleetune.pricing.tracing import Tracing, WorkShape
from support import runs, tiny

FAST: dict[str, Any] = {"evaluation.generate": False}


def test_quotas_are_those_of_algorithm_1():
    """J = 4, K = 4, M = 8, B = 16. alpha = 0.5, 0.3, 0.15, 0.05: shares 8, 4.8, 2.4, 0.8, floors 8, 4, 2, 0, and 2 left over.

    The first is full. Greedy gives both to the second; in turn, the second and the third get one each.
    """
    alpha = [0.5, 0.3, 0.15, 0.05]
    assert elastic_quotas(alpha, 4, [8] * 4) == [8, 6, 2, 0]
    assert elastic_quotas(alpha, 4, [8] * 4, residual="round_robin") == [8, 5, 3, 0]


def test_the_residual_fills_one_matrix_before_the_next():
    """alpha = 0.9, 0.05, 0.05 of B = 12 under M = 5: 5, 0, 0 and 7 left, of which the second gets 5 and the third 2."""
    assert elastic_quotas([18.0, 1.0, 1.0], 4, [5] * 3) == [5, 5, 2]
    assert elastic_quotas([18.0, 1.0, 1.0], 4, [5] * 3, residual="round_robin") == [5, 4, 3]


@pytest.mark.parametrize("residual", ["greedy", "round_robin"])
def test_quotas_sum_to_the_budget_under_the_caps(residual: Any):
    """For 64 matrices of random importances, small and large spreads; also with caps of their own."""
    draws = np.random.default_rng(0)
    for spread in (0.0, 0.3, 1.0, 3.0):
        importance = draws.lognormal(0.0, spread, 64).tolist()
        for caps in ([64] * 64, draws.integers(32, 65, 64).tolist()):
            quotas = elastic_quotas(importance, 32, caps, residual=residual)
            assert sum(quotas) == 32 * 64
            assert all(0 <= q <= cap for q, cap in zip(quotas, caps, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 7e-20])
def test_equal_importances_give_equal_quotas(value: float):
    assert elastic_quotas([value] * 49, 3, [7] * 49) == [3] * 49


@functools.cache
def measured() -> tuple[runs.Finished, list[runs.Passed]]:
    """A run of three rounds, of which the first measures."""
    return runs.recorded(tiny.spec(FAST, method="smartfed"))


def test_importance_is_the_slope_of_the_loss_along_a_rank_s_factor():
    """|dLoss / dm_i| by a central difference of the loss, for two ranks, of a client's first batch alone."""
    done, passed = measured()
    method, worker = done.problem.method, runs.worker(done.problem)
    cohort = passed[0].unit.cohorts[0]
    payload, task = passed[0].payloads[cohort.payload], passed[0].unit.tasks(cohort)[0]
    task = type(task)(**{**vars(task), "rows": task.rows[:1]})
    upload = method.local_update(worker, payload, [task]).upload
    assert upload is not None
    name, step = "layers.2.self_attn.v_proj", 1e-2
    importance = upload.client(0)[f"{name}.importance"]
    for rank in (0, 5):
        losses = []
        for sign in (1, -1):
            adapter = method.client_adapter(payload)
            adapter[f"{name}.expert_gate"][rank] += sign * step
            shifted = type(method)(method.config, method.context)
            shifted.client_adapter = lambda _, adapter=adapter: adapter  # type: ignore[method-assign]
            losses.append(shifted.local_update(worker, payload, [task]).losses[0])
        slope = abs(losses[0] - losses[1]) / (2 * step)
        assert importance[rank].item() == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_quotas_follow_what_clients_measured():
    """The first round sends importances and leaves the routers as they are; the next ones send routers."""
    done, passed = measured()
    method, state = done.problem.method, done.state
    sent = [set(one.partial_sum.unpack()) for one in passed if one.partial_sum is not None]
    sites = list(method.context.sites)
    assert all(names in ({f"{s}.importance" for s in sites}, {f"{s}.router" for s in sites}) for names in sent)
    sums = [float(state.tensors[f"{site}.importance"].double().sum()) for site in sites]
    assert state.values["quotas"] == elastic_quotas(sums, 2, [7] * 28)
    assert sum(state.values["quotas"]) == 2 * 28
    assert len(set(state.values["quotas"])) > 1
    assert done.rounds["activated_rank"].tolist() == [2.0] * 3


def test_importances_are_measured_again_when_they_are_old():
    """Every second round: rounds 1 and 3 of 4 measure, and 2 and 4 train."""
    settings = {**FAST, "method.importance_every": 2, "rounds.num_rounds": 4}
    done = runs.run(tiny.spec(settings, method="smartfed"))
    sent = done.clients.groupby("round")["uplink_bytes"].first().tolist()
    assert sent[0] == sent[2] == 4 * 7 * 28
    assert sent[1] == sent[3] == 4 * 7 * 4 * (6 * 32 + 48)


def queries_and_values(library: Path, folder: Path) -> Path:
    """The library's adapters with their pairs at query and value projections alone."""
    for adapter in sorted(library.iterdir()):
        (folder / adapter.name).mkdir()
        kept = {name: t for name, t in load_file(adapter / WEIGHTS).items() if ".q_proj." in name or ".v_proj." in name}
        save_file(kept, folder / adapter.name / WEIGHTS)
        (folder / adapter.name / CONFIG).write_text((adapter / CONFIG).read_text())
    return folder


@pytest.mark.parametrize(
    ("router", "numbers"),
    [
        ("matrix", 32 * 2 * 64 * 4096),  # 16.8 million, 0.249 % of the model: as many as a LoRA of rank 32
        ("layer", 32 * 64 * 4096),  # 8.4 million, 0.124 %
        ("low-rank", 32 * 2 * 8 * (4096 + 64)),  # 2.1 million, 0.032 %
    ],
)
def test_the_router_of_llama2_7b_has_this_size(router: str, numbers: int, tmp_path: Path):
    """Two adapters of rank 32 at the query and value projections, as in the paper. It states less than 0.1 % of the model."""
    library = queries_and_values(Path(tiny.library_folder((32, 32))), tmp_path)
    q_and_v = {"method.adapters": [str(library)]}
    fields = {**FAST, **q_and_v, "model.lora.targets": ["q_proj", "v_proj"], "method.router": router}
    made = runs.problem(tiny.spec(fields, method="smartfed"))
    costed = CostedModel(made.inputs.base, architecture("llama2-7b"), axes=made.method.axes)
    assert costed.num_bytes(made.method.start().tensors, 4) == 4 * numbers


def test_all_ranks_with_equal_gates_are_the_sum_of_the_adapters():
    """Routers of 0, a quota of the whole pool and gates scaled to 1: the pairs joined, in a run of plain pairs."""
    settings = {"method.quota": 7, "method.router_std": 0.0, "method.elastic": False}
    made = runs.problem(tiny.spec({**FAST, **settings}, method="smartfed"))
    model = made.method.evaluated(made.method.start(), lambda: iter(()))
    network = runs.worker(made).network(model.model)
    skills = [skill.pairs(made.spec.model.lora.scaling) for skill in made.method.skills]
    joined = {
        name: torch.cat([pairs[name] for pairs in skills], dim=0 if name.endswith("A") else 1) for name in skills[0]
    }
    out = []
    for adapter, held in ((model.adapter, model.model.held), (joined, {})):
        network.hold(held)
        network.set_adapter({name: tensor[None] for name, tensor in adapter.items()})
        with torch.no_grad():
            out.append(network.blocks(network.embed(torch.arange(3, 11)[None])))
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)


def test_a_step_costs_what_is_chosen():
    """FLOPs rise with the quota; a larger pool of the same quota adds the router's own product alone.

    A block's seven matrices have in + out = 4 x 64 + 3 x 80 = 496 and in = 6 x 32 + 48 = 240. For a token, a chosen rank takes
    2 (in + out) forward and as many backward; an expert in the pool takes 2 in of the router forward and 2 x 2 in backward. The
    query, key and value of the lowest block read the embedding, which needs no gradient: 3 x 2 x 32 less of either.
    """

    def flops(ranks: tuple[int, ...], quota: int) -> float:
        fields = {"method.adapters": [tiny.library_folder(ranks)], "method.quota": quota, "method.elastic": False}
        made = runs.problem(tiny.spec({**FAST, **fields}, method="smartfed"))
        method, spec = made.method, made.spec
        payload = method.broadcast(method.start(), 1, None)
        tracing = Tracing(CostedModel(made.inputs.base, axes=method.axes), method, spec.model.lora, spec.local, None)
        client = tracing.trace(payload, WorkShape()).client
        return float((client.counts * client.products[:, 0, BASIS.index("B S")]).sum())

    few = flops((2, 2), 1)
    assert flops((2, 2), 3) - few == 2 * (4 * 4 * 496 - 3 * 2 * 32)
    assert flops((4, 4), 1) - few == 4 * (6 * 4 * 240 - 3 * 2 * 32)
