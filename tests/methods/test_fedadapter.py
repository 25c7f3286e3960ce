"""FedAdapter: trials of deeper and wider adapters on the clock, and growth that changes no function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fleetune.cost.trace import PARTS
from fleetune.engine.round.ranks import filled
from fleetune.errors import UserError
from fleetune.methods.base import ClientInfo, Method, Report, State, Update
from fleetune.methods.fedadapter import DEEP, STAY, WIDE, FedAdapter, grown, winner
from fleetune.models.adapters import Bottleneck
from fleetune.models.peft_format import OWN_CONFIG, load_tensors
from fleetune.plan.walk import plan
from fleetune.pricing.mapping import CostedModel
from fleetune.pricing.tracing import Tracing, WorkShape
from fleetune.tensors import Tensors
from support import runs, tiny

FAST = {"evaluation.generate": False, "evaluation.every": 1}
SIZES = {"method.depth": 1, "method.width": 2, "method.width_step": 2, "method.max_width": 5}


def made(num_layers: int = 4, **overrides: Any) -> FedAdapter:
    """The method on the tiny model: depth 1, width 2 in steps of 2 up to 5, trials of 1 s whatever the depth."""
    settings = {**SIZES, "method.trial_seconds": 1.0, "method.expand": 0.0, **overrides}
    spec = tiny.spec({**FAST, **settings, "model.base": tiny.model_folder(num_layers)}, method="fedadapter")
    method = runs.problem(spec).method
    assert isinstance(method, FedAdapter)
    return method


def branch(state: State, name: str) -> Tensors:
    prefix = f"{name}."
    return {n.removeprefix(prefix): t for n, t in state.tensors.items() if n.startswith(prefix)}


def qualities(**losses: float) -> dict[str, float]:
    return {"eval_loss": 0.0, **{f"eval_loss/{name}": loss for name, loss in losses.items()}}


def test_growth_changes_no_function():
    """Two trained units stay, to new ones the output owes nothing: their column of U is 0. New blocks add 0 to their half."""
    method, y = made(), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    trained = {name: tensor + 0.1 for name, tensor in method._fresh(1, 2).items()}
    larger = grown(trained, method._fresh(3, 4))
    assert {name.split(".")[1] for name in larger} == {"1", "2", "3"}
    for block in (1, 2, 3):
        after = Bottleneck.of({n: t[None] for n, t in larger.items()}, f"layers.{block}.mlp")
        assert after is not None
        before = Bottleneck.of({n: t[None] for n, t in trained.items()}, f"layers.{block}.mlp")
        torch.testing.assert_close(after(y), torch.zeros_like(y) if before is None else before(y), rtol=1e-6, atol=1e-6)
    runs.same_tensors(grown(method._fresh(1, 2), method._fresh(3, 4)), method._fresh(3, 4))  # any path, the same units


def test_a_trial_has_three_branches_and_ends_behind_an_evaluated_round_when_its_time_is_over():
    """Trials of 1 s, evaluations every 2 rounds: 0.9 s is too early, before round 3 nothing was evaluated, at 4 it ends."""
    method = made(**{"evaluation.every": 2})
    state = method.begin_round(method.start(), 0, Report(0.0))
    assert method.branches(1, 2) == {STAY: (1, 2), WIDE: (1, 4), DEEP: (2, 2)}
    assert method.columns(state) == {"depth": 1.0, "width": 2.0, "trial": 1.0}
    quality = qualities(stay=3.0, wide=2.0, deep=1.0)
    assert method.begin_round(state, 2, Report(0.9, quality)) is state
    assert method.begin_round(state, 3, Report(1.1, quality)) is state
    after = method.begin_round(state, 4, Report(1.5, quality))
    assert method.columns(after) == {"depth": 2.0, "width": 2.0, "trial": 2.0}
    assert after.values["since"] == 1.5
    runs.same_tensors(branch(after, STAY), branch(state, DEEP))
    assert set(method.evaluated(after, lambda: iter(()))) == {"main", STAY, WIDE, DEEP}


def test_trials_are_longer_the_deeper_the_adapters():
    """T (e d + 1) = 90 (4 · 2 + 1) = 810 s."""
    method = made(**{"method.trial_seconds": 90.0, "method.expand": 4.0})
    assert method.trial_length(2) == 810


@pytest.mark.parametrize(
    ("quality", "best"),
    [
        (qualities(stay=1.0, wide=1.0, deep=1.0), STAY),
        (qualities(stay=2.0, wide=1.0, deep=1.0), WIDE),
        (qualities(stay=10.0, wide=9.5, deep=9.0), DEEP),  # as numbers: as words "10.0" would come before "9.0"
        (qualities(stay=2.0, wide=3.0, deep=float("nan")), STAY),
        ({**qualities(stay=1.0, wide=2.0, deep=3.0), "eval_accuracy/stay": 0.1, "eval_accuracy/wide": 0.3}, WIDE),
    ],
)
def test_the_best_branch_wins_and_of_equals_the_shallow_then_the_wide(quality: dict[str, float], best: str):
    """By accuracy if there is one, else by loss; a branch whose loss is no number never wins."""
    if "eval_accuracy/stay" in quality:
        quality = {**quality, "eval_accuracy/deep": 0.2}
    assert winner(quality, [STAY, WIDE, DEEP], 1) == best


def test_adapters_grow_to_the_caps_and_then_there_are_no_trials():
    """Without quality, as in a plan, deep and wide win in turn: (1, 2), (2, 2), (2, 4), (3, 4), (3, 5), (4, 5)."""
    method = made()
    state, seen = method.begin_round(method.start(), 0, Report(0.0)), []
    for round_idx in range(1, 9):
        seen.append((state.values["depth"], state.values["width"]))
        for name, (depth, width) in method.branches(*seen[-1]).items():
            adapter = branch(state, name)
            assert len(adapter) == 4 * depth
            assert adapter["layers.3.mlp.bottleneck_down"].shape == (width, 32)
        state = method.begin_round(state, round_idx, Report(2.0 * round_idx))
    assert seen == [(1, 2), (2, 2), (2, 4), (3, 4), (3, 5), (4, 5), (4, 5), (4, 5)]
    assert list(method.evaluated(state, lambda: iter(()))) == ["main"]


def test_every_branch_has_its_share_of_every_round():
    """Five clients: 2, 2 and 1, and after three rounds each branch has had five."""
    method = made()
    state = method.begin_round(method.start(), 0, Report(0.0))
    clients = [ClientInfo(i, "jetson-nano", 0.0, 1, 0) for i in (2, 3, 5, 8, 13)]
    dealt = [method.groups(state, round_idx, clients) for round_idx in range(3)]
    assert all(sorted(round_.count(name) for name in (STAY, WIDE, DEEP)) == [1, 2, 2] for round_ in dealt)
    assert all(sum(round_.count(name) for round_ in dealt) == 5 for name in (STAY, WIDE, DEEP))


def test_each_branch_averages_its_own_clients():
    """Weights 0.2 and 0.3 in one branch, 0.5 in another: (0.2 a + 0.3 b) / 0.5 and c; the third stays as it is."""
    method = made()
    state = method.begin_round(method.start(), 0, Report(0.0))
    a, b = ({name: torch.full_like(t, x) for name, t in branch(state, STAY).items()} for x in (1.0, 2.0))
    c = {name: torch.full_like(t, 3.0) for name, t in branch(state, DEEP).items()}
    updates = [
        Update(a, 0.2, (0,), group=STAY, total_weight=0.2),
        Update(b, 0.3, (1,), group=STAY, total_weight=0.3),
        Update({name: 0.5 * t for name, t in c.items()}, 1.0, (2,), group=DEEP, total_weight=0.5),
    ]
    after = method.aggregate(state, updates, 0)
    runs.close_tensors(branch(after, STAY), {name: torch.full_like(t, 1.6) for name, t in a.items()})
    runs.close_tensors(branch(after, DEEP), c)
    runs.same_tensors(branch(after, WIDE), branch(state, WIDE))


def test_with_caps_at_the_start_it_is_fedavg_of_bottlenecks():
    """Bit for bit: one branch, whose average is the plain weighted sum."""
    method = made(**{"method.max_depth": 1, "method.max_width": 2})
    state = method.begin_round(method.start(), 0, Report(0.0))
    generator = torch.Generator().manual_seed(1)
    uploads = [{n: torch.randn(t.shape, generator=generator) for n, t in branch(state, STAY).items()} for _ in range(2)]
    updates = [Update(u, w, (i,), group=STAY) for i, (u, w) in enumerate(zip(uploads, (0.3, 0.7), strict=True))]
    plain = Method.aggregate(method, State(branch(state, STAY)), updates, 0)
    runs.same_tensors(branch(method.aggregate(state, updates, 0), STAY), plain.tensors)


def test_frozen_blocks_below_cost_a_forward_pass_alone():
    """Depth 1 on two blocks and on four: the same bytes saved, the same gradients; two blocks forward are all that is added.

    Forward of a block on B S tokens: 2 B S numbers of its matrices, and 4 B S^2 D for scores and values.
    """
    traces = {}
    for num_layers in (2, 4):
        problem = runs.problem(
            tiny.spec({**FAST, **SIZES, "model.base": tiny.model_folder(num_layers)}, method="fedadapter")
        )
        method, spec = problem.method, problem.spec
        payload = method.broadcast(method.begin_round(method.start(), 0, Report(0.0)), 0, STAY)
        tracing = Tracing(CostedModel(problem.inputs.base), method, spec.model.lora, spec.local, None)
        traces[num_layers] = tracing.trace(payload, WorkShape())
    assert traces[2].saved.tolist() == traces[4].saved.tolist()
    for part in ("adapters", "gradients", "optimizer", "saved"):
        peaks = [traces[n].moments[:, PARTS.index(part)].max(axis=0).tolist() for n in (2, 4)]
        assert peaks[0] == peaks[1], part
    matrices = 4 * 32 * 32 + 3 * 32 * 48
    added = traces[4].client.flops - traces[2].client.flops
    assert added.tolist() == [0, 0, 0, 2 * 2 * matrices, 2 * 4 * 32, 0, 0, 0, 0]  # nothing on a reference path


def test_a_run_that_is_stopped_within_a_trial_goes_on_bit_for_bit(tmp_path: Path):
    """Evaluated every other round: of trials of two rounds the second is broken off after its first round."""
    spec = tiny.spec({**FAST, **SIZES, "evaluation.every": 2, "rounds.num_rounds": 4}, method="fedadapter")
    whole = runs.run(spec)
    assert whole.rounds["trial"].tolist() == [1, 1, 2, 2]
    assert all(whole.rounds[name].is_monotonic_increasing for name in ("depth", "width"))
    np.testing.assert_array_equal(whole.rounds["eval_loss"], whole.rounds["eval_loss/stay"])
    runs.run(spec, folder=tmp_path, stop_after=3)
    runs.same_runs(runs.run(spec, folder=tmp_path), whole)
    folder = whole.run_dir.path / "adapter"
    assert (folder / OWN_CONFIG).exists()
    runs.same_tensors(load_tensors(folder), dict(whole.deployed.adapter))


def test_units_are_the_ranks_that_a_small_client_leaves_out():
    """Of two units one client (p = 0.25) trains both, another (0.75) the first: by rows 0.25 a + 0.75 b, and a alone."""
    sent = {"layers.0.mlp.bottleneck_down_bias": torch.zeros(2)}
    (name,) = sent
    both, first = torch.tensor([4.0, 8.0]), torch.tensor([12.0])
    trained = np.array([1.0, 0.25])
    full = [filled({name: t}, sent, total_weight=1.0, trained=trained)[name] for t in (both, first)]
    assert (0.25 * full[0] + 0.75 * full[1]).tolist() == [0.25 * 4 + 0.75 * 12, 8.0]


def test_a_plan_lets_deep_and_wide_win_in_turn_and_says_so():
    found = plan(tiny.spec({**FAST, **SIZES, "rounds.num_rounds": 4}, method="fedadapter"), hints=False)
    assert [(row["depth"], row["width"]) for row in found.rounds] == [(1, 2), (2, 2), (2, 4), (3, 4)]
    assert any("deep and the wide branch in turn" in line for line in found.assumptions)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"method.depth": 5}, "method.depth"),
        ({"method.max_depth": 5}, "method.max_depth"),
        ({"method.depth": 3, "method.max_depth": 2}, "method.max_depth"),
        ({"method.width": 6}, "method.max_width"),
        ({"method.depth_step": 0}, "method.depth_step"),
        ({"method.width_step": 0}, "method.width_step"),
        ({"method.trial_seconds": 0}, "method.trial_seconds"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], field: str):
    with pytest.raises(UserError) as caught:
        made(**settings)
    assert field in str(caught.value)


def test_clients_of_a_small_budget_train_fewer_units():
    """A block costs 4 (65 w + 32) bytes each way: 1,296 at w = 2, 776 at 1. With 1,600 a Jetson Nano takes the wide branch's
    four units down to two, and the deep branch's two, in each of two blocks, down to one."""
    budget = {"fleet.adapt": "rank", "fleet.budgets": {"bytes_per_round": {"jetson-nano": 1_600}}}
    wide = {**FAST, **SIZES, **budget, "evaluation.every": 3, "rounds.clients_per_round": 6}
    done = runs.run(tiny.spec(wide, method="fedadapter"))
    assert (done.clients["status"] == "ok").all()
    nano = done.clients["device"] == "jetson-nano"
    assert set(done.clients["rank"][nano]) == {1, 2}
    assert set(done.clients["rank"][~nano]) == {2, 4}
    assert done.clients["uplink_bytes"][nano].max() == 776
    assert np.isfinite(done.rounds["eval_loss"].iloc[-1])
    assert done.state.tensors["deep.layers.2.mlp.bottleneck_down_bias"].shape == (2,)
