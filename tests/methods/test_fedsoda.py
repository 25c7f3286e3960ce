"""FedSODA: which blocks are kept, what is aligned, what travels, and the server's own work on a worker."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from fleetune.engine.round.serving import serve
from fleetune.errors import UserError
from fleetune.methods import wrapping
from fleetune.methods.base import Method, MethodConfig, Payload, Report, ServerWork, State
from fleetune.methods.distillation import Alignment, alignment_loss
from fleetune.methods.similarity_groups import cheapest_groups, groups_above, kept_blocks, run_costs
from fleetune.methods.traits import Traits
from fleetune.methods.wire import from_wire, to_wire
from fleetune.models.nf4_rows import LEVELS, from_nf4, nf4_bytes, to_nf4
from fleetune.models.quantize import is_linear
from fleetune.plan.walk import plan
from fleetune.tensors import num_bytes
from fleetune.training.worker import Worker
from support import runs, tiny

EVERYBODY = {"rounds.clients_per_round": 6, "evaluation.generate": False}
LIKE_FEDIT = {"keep": 1.0, "quantization": "none", "align_steps": 0, "realign_steps": 0, "send_sub_model": False}


def spec(**overrides: Any) -> Any:
    return tiny.spec({"evaluation.generate": False, **overrides}, method="fedsoda")


def similarities(seed: int, num_layers: int) -> np.ndarray:
    half = np.random.default_rng(seed).uniform(-1, 1, (num_layers, num_layers))
    return np.where(np.eye(num_layers), 1.0, (half + half.T) / 2)


# -- which blocks -------------------------------------------------------------------------------------------------------
def test_the_cost_of_a_run_is_how_unlike_its_first_block_the_others_are():
    """Blocks 1 to 3 of sim(1, 2) = 0.5 and sim(1, 3) = 0.25: 0 + 0.5 + 0.75."""
    similarity = np.eye(4)
    similarity[1, 2], similarity[1, 3] = 0.5, 0.25
    assert run_costs(similarity)[1, 4] == 1.25
    assert run_costs(similarity)[1, 2] == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_no_division_into_runs_is_cheaper(seed: int):
    """All C(6, k - 1) divisions of seven blocks into k runs, tried one by one."""
    similarity = similarities(seed, 7)
    cost = run_costs(similarity)
    for k in range(1, 8):
        found = cheapest_groups(similarity, k)
        assert [layer for group in found for layer in group] == list(range(7))
        assert len(found) == k
        borders = [(0, *cuts, 7) for cuts in itertools.combinations(range(1, 7), k - 1)]
        best = min(sum(cost[a, b] for a, b in itertools.pairwise(cuts)) for cuts in borders)
        assert sum(cost[group[0], group[-1] + 1] for group in found) == pytest.approx(best, abs=1e-8)


def test_a_threshold_ends_a_group_where_a_block_is_too_unlike_its_first():
    similarity = np.eye(5)
    similarity[0, 1], similarity[0, 2], similarity[2, 3], similarity[2, 4] = 0.9, 0.7, 0.95, 0.8
    assert groups_above(similarity, 0.8) == [[0, 1], [2, 3, 4]]
    assert groups_above(similarity, -1.0) == [[0, 1, 2, 3], [4]]  # never one group alone
    assert groups_above(similarity, 1.0) == [[0], [1], [2], [3], [4]]


def test_the_most_influential_block_of_a_group_is_kept_and_both_ends_always():
    influence = np.array([0.0, 0.9, 0.2, 0.5, 0.5, 0.8, 0.1])
    assert kept_blocks([[0, 1], [2, 3, 4], [5, 6]], influence) == [0, 3, 6]


@pytest.mark.parametrize("similarity", ["cosine", "cka"])
def test_the_run_keeps_groups_and_similarities_on_record(similarity: str):
    done = runs.run(spec(**{"method.similarity": similarity, "method.keep": 3}))
    kept = json.loads((done.run_dir.path / "method" / "stage_0.json").read_text())
    assert kept["kept"] == sorted(kept["kept"])
    assert (kept["kept"][0], kept["kept"][-1], len(kept["kept"])) == (0, 3, 3)
    assert [layer for group in kept["groups"] for layer in group] == [0, 1, 2, 3]
    assert all(layer in group for layer, group in zip(kept["kept"], kept["groups"], strict=True))
    matrix = np.array(kept["similarity"])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    np.testing.assert_allclose(matrix.diagonal(), 1.0, atol=1e-5)
    adapter = json.loads((done.run_dir.path / "adapter" / "adapter_config.json").read_text())
    assert adapter["layers_to_transform"] == kept["kept"]


@pytest.mark.parametrize("keep", [1, 0.25, 5, 1.5])
def test_a_sub_model_of_fewer_than_two_or_more_than_all_blocks_is_refused(keep: float):
    with pytest.raises(UserError, match=r"method\.keep.*it must be from 2"):
        runs.problem(spec(**{"method.keep": keep}))


def test_more_examples_than_there_are_and_an_alignment_without_a_loss_are_refused():
    with pytest.raises(UserError, match=r"calibration_examples.*training examples"):
        runs.problem(spec(**{"method.calibration_examples": 100_000}))
    with pytest.raises(UserError, match=r"logits_weight.*without a loss"):
        runs.problem(spec(**{"method.logits_weight": 0, "method.hidden_weight": 0}))


# -- the alignment ------------------------------------------------------------------------------------------------------
def test_the_loss_of_the_alignment():
    """T = 2: 4 KL of the halved logits. Hidden (3, 4) has mean square 12.5; (1, 1) off: (1 + 1) / 2 / 12.5 = 0.08."""
    full, sub = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    h = torch.tensor([[3.0, 4.0]])
    how = Alignment(logits_weight=1.0, hidden_weight=10.0, temperature=2.0, learning_rate=0.1)
    p, q = (full / 2).softmax(-1), (sub / 2).softmax(-1)
    expected = 4 * kl_div(q.log(), p, reduction="sum") + 10 * 0.08
    torch.testing.assert_close(alignment_loss((full, [h]), (sub, [h + 1]), how), expected)
    assert alignment_loss((full, [h]), (full, [h]), how) == 0


def test_the_divergence_of_gradients_and_the_loss_fall_with_the_alignment():
    """On blocks that matter: ten times the random weights, which change the residual stream so little that pruning is no loss.

    It is no theorem: with steps of 0.01 the loss falls further here, and the divergence rises.
    """
    settings = {"align_steps": 60, "learning_rate": 0.003, "calibration_examples": 32, "batch_size": 8}
    settings |= {"divergence_examples": 16, "realign_steps": 0}
    made = runs.problem(spec(**{f"method.{name}": value for name, value in settings.items()}))
    base = made.inputs.base
    base = replace(base, weights={name: w * 10 if is_linear(name) else w for name, w in base.weights.items()})
    worker = Worker(base=base, lora=made.spec.model.lora, local=made.spec.local, data=made.inputs.train)
    carry_out = functools.partial(made.method.serve, worker)
    state, _ = serve(made.method, made.method.start(), 0, carry_out=carry_out, price=lambda work: (0.0, 0.0))
    before, after = state.values["divergence"]
    first, last = state.values["align_loss"]
    assert 0 < after < before
    assert last < first / 2


def test_with_all_blocks_in_full_precision_and_no_alignment_it_is_fedit_bit_for_bit():
    mine = runs.run(spec(**{f"method.{name}": value for name, value in LIKE_FEDIT.items()}))
    fedit = runs.run(tiny.spec({"evaluation.generate": False}))
    runs.same_tensors(mine.state.tensors, fedit.state.tensors)
    runs.same_tensors(mine.deployed.adapter, fedit.deployed.adapter)
    assert mine.clients.equals(fedit.clients)
    common = [name for name in fedit.rounds.columns if name in mine.rounds.columns]
    assert mine.rounds[common].equals(fedit.rounds[common])
    assert (mine.rounds["divergence_before"] == 0).all()


# -- what travels -------------------------------------------------------------------------------------------------------
def test_after_the_first_round_adapters_alone_travel():
    """rank 2 and 32 wide: a block has 2 · (4 · 64 + 3 · 80) numbers; the sub-model comes once, in NF4."""
    done = runs.run(spec(**{**EVERYBODY, "method.quantization": "nf4"}))
    theta = 4 * 2 * 2 * (4 * (32 + 32) + 3 * (32 + 48))
    down = done.clients.groupby("round")["downlink_bytes"].unique()
    (first,) = down[1]
    assert [list(down[2]), list(down[3])] == [[theta], [theta]]
    assert done.clients["uplink_bytes"].unique().tolist() == [theta]
    payload = done.problem.method.broadcast(done.state, 0, None)
    assert payload.provision is not None
    assert first - theta == num_bytes(payload.provision.missing(None)[0])


def test_four_bits_are_charged_as_they_lie():
    """Each of r = 2 rows of n numbers: n / 2 bytes of codes and 4 for the scale of every 64."""
    done = runs.run(spec(**{**EVERYBODY, "method.adapter_bits": 4, "rounds.num_rounds": 2}))
    block = 2 * (4 * 2 * (16 + 4) + 3 * (16 + 4 + 24 + 4))
    assert done.clients["uplink_bytes"].unique().tolist() == [2 * block]
    assert done.clients[done.clients["round"] == 2]["downlink_bytes"].unique().tolist() == [2 * block]


def test_levels_come_back_and_sizes_are_those_that_are_told():
    rows = torch.stack([torch.tensor(LEVELS) * 3.0, torch.zeros(16)])
    torch.testing.assert_close(from_nf4(to_nf4(rows), 16), rows, rtol=0, atol=0)
    for size in (1, 63, 64, 65, 130):
        x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
        packed = to_nf4(x)
        assert packed.shape == (3, nf4_bytes(size))
        back = from_nf4(packed, size)
        # Half of the widest gap between levels, 0.304 of the largest number of a block.
        assert ((back - x).abs() <= 0.1521 * x.abs().amax(1, keepdim=True)).all()
        torch.testing.assert_close(from_nf4(to_nf4(back), size), back)


def test_pairs_come_back_under_their_names():
    sites = {"layers.0.mlp.up_proj": (6, 10)}
    pair = {"layers.1.mlp.up_proj.lora_A": torch.ones(2, 6), "layers.1.mlp.up_proj.lora_B": -torch.ones(10, 2)}
    runs.same_tensors(from_wire(to_wire(pair), sites), pair)


# -- the server's own work ----------------------------------------------------------------------------------------------
def test_the_servers_work_takes_time_that_clients_wait_for_and_a_plan_knows_it():
    job = spec(**{"method.realign_every": 2})
    done = runs.run(job)
    seconds = done.rounds["server_seconds"].tolist()
    assert seconds[0] > seconds[2] > seconds[1] == 0  # rounds 1 and 3 begin with an alignment
    assert (done.rounds["server_flops"] > 0).tolist() == [True, False, True]
    turns = done.clients.groupby("round")["sim_seconds"].max().to_numpy()
    np.testing.assert_allclose(np.diff(done.rounds["sim_seconds"], prepend=0.0), turns + seconds)
    planned = plan(job).rounds
    for name in ("server_seconds", "server_flops", "sim_seconds", "downlink_bytes", "uplink_bytes"):
        np.testing.assert_allclose([row[name] for row in planned], done.rounds[name])


def test_what_is_measured_is_charged_to_nobody_and_changes_nothing():
    seen, unseen = (runs.run(spec(**{"method.divergence_examples": n})) for n in (4, 0))
    runs.same_tensors(seen.state.tensors, unseen.state.tensors)
    assert seen.rounds["sim_seconds"].tolist() == unseen.rounds["sim_seconds"].tolist()
    assert "divergence_after" not in unseen.rounds.columns


class ServingConfig(MethodConfig):
    name: str = "fedit"

    @property
    def traits(self) -> Traits:
        return Traits(serves=True)


class Serving(Method):
    """Before each round a worker counts the examples that it is given."""

    Config = ServingConfig

    def server_work(self, state: State, round_idx: int) -> ServerWork | None:
        if state.values.get("round") == round_idx:
            return None
        return ServerWork(Payload(state.tensors, {"round": round_idx}), np.array([[0, 1]]), is_charged=False)

    def serve(self, worker: Any, work: ServerWork) -> dict[str, torch.Tensor]:
        return {"counted": torch.tensor(work.rows.size)}

    def served(self, state: State, work: ServerWork, result: dict[str, torch.Tensor]) -> State:
        return State(state.tensors, {**work.payload.values, "counted": int(result["counted"])})


def test_devft_forwards_the_servers_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(wrapping.INNER, "fedit", Serving)
    made = runs.problem(tiny.spec(method="devft"))
    assert made.method.traits.serves
    state = made.method.begin_round(made.method.start(), 0, Report(0.0))
    work = made.method.server_work(state, 0)
    assert work is not None
    assert made.method.submodel(work.payload).num_layers == 1
    state = runs.begun(made, made.method.start(), 0)
    assert state.values["inner"]["counted"] == 2
    assert made.method.server_work(state, 0) is None
