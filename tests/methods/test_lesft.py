"""LESFT: the cut changes nothing, weights of 1 are SplitLoRA, constant weights send nothing down, bytes are the formulas'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fleetune.data.batches import collate
from fleetune.errors import UserError
from fleetune.methods.base import State
from fleetune.methods.lesft import LESFT
from fleetune.methods.split_round import SplitRound
from fleetune.methods.token_weights import clusters, token_weights
from fleetune.models.block import norm
from fleetune.problem import Problem
from fleetune.tensors import Tensors
from fleetune.training.loss import token_losses
from fleetune.training.plan import ClientTask
from support import runs, tiny

RATE = 0.5
SGD: dict[str, Any] = {
    "evaluation.generate": False,
    "local.max_grad_norm": None,
    "local.optimizer": "sgd",
    "local.learning_rate": RATE,
    # A random model gives every token about 1/721: with this threshold there are tokens of all three classes.
    "method.p_sal": 0.0014,
}


def made(**overrides: object) -> tuple[Problem, LESFT, State]:
    problem = runs.problem(tiny.spec({**SGD, **overrides}, method="lesft"))
    assert isinstance(problem.method, LESFT)
    generator = torch.Generator().manual_seed(0)
    start = problem.method.start().tensors
    warm = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in start.items()}
    return problem, problem.method, State(warm)


def tasks(num_clients: int) -> list[ClientTask]:
    """One step of three examples for each client."""
    rows = np.arange(3 * num_clients).reshape(num_clients, 1, 3)
    return [ClientTask(k, 1 / num_clients, rows[k], RATE, address=(0, 0)) for k in range(num_clients)]


def whole_models(problem: Problem, params: Tensors, rows: np.ndarray) -> tuple[float, Tensors]:
    """Loss (17), example by example, and its gradients, on the model that is not cut."""
    config = problem.method.config
    network = runs.worker(problem).network(problem.method.context.whole_model)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    network.set_adapter({name: leaf[None] for name, leaf in leaves.items()})
    total: Any = 0.0
    for row in rows:
        paths = []
        for data in (problem.inputs.train, problem.inputs.train.reference):
            assert data is not None
            ids, labels = (torch.from_numpy(a) for a in collate(data, np.array([row])))
            h = network.blocks(network.embed(ids))
            paths.append((h, *token_losses(network, h, labels)))
        (h, losses, counted), (_, reference, _) = paths
        logs = -reference if config.ref_grad == "through" else -reference.detach()
        salient = logs.detach().exp() > config.p_sal
        features = norm(network.model.model.norm, h[0, counted].detach())[1]
        sub = clusters(features, salient, torch.zeros_like(counted), mode=config.cluster_mode)
        weights = token_weights(logs, sub, p_sal=config.p_sal, gammas=(5.0, 0.3, 0.6))
        total = total + (weights * losses).mean() / len(rows)
    grads = torch.autograd.grad(total, list(leaves.values()))
    network.set_adapter(None)
    return total.item(), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("ref_grad", ["detached", "through"])
def test_one_step_is_the_uncut_models_descent_on_equation_17(ref_grad: str):
    """Clients' halves follow each its own loss, the server's the mean over all; with either reading of the gradient."""
    problem, method, state = made(**{"method.ref_grad": ref_grad})
    pair = tasks(2)
    update = method.local_update(runs.worker(problem), method.broadcast(state, 0, None), pair)
    found = [whole_models(problem, state.tensors, task.rows[0]) for task in pair]
    np.testing.assert_allclose(update.losses, [loss for loss, _ in found], rtol=1e-5)
    assert update.upload is not None
    for name, start in state.tensors.items():
        if method.on_client(name):
            for k, (_, grads) in enumerate(found):
                torch.testing.assert_close(
                    update.upload.client(k)[name], start - RATE * grads[name], rtol=1e-4, atol=1e-5
                )
        else:
            mean = (found[0][1][name] + found[1][1][name]) / 2
            torch.testing.assert_close(update.server[name], start - RATE * mean, rtol=1e-4, atol=1e-5)


def test_weights_of_one_over_tokens_are_split_lora_bit_for_bit():
    same = {**SGD, "method.split_point": 2}
    del same["method.p_sal"]
    split = runs.run(tiny.spec(same, method="split-lora"))
    for way in ({"method.uniform": 1.0}, {"method.paths": "base"}):
        ours = runs.run(tiny.spec({**same, **way, "method.average": "tokens"}, method="lesft"))
        runs.same_tensors(ours.state.tensors, split.state.tensors)
        for column in ("uplink_bytes", "downlink_bytes", "flops", "server_flops"):
            assert ours.clients[column].tolist() == split.clients[column].tolist()


def test_a_weight_of_zero_leaves_the_model_untrained():
    """Table 3's first row, read as S = 0: the loss is 0. With the plain loss added it is that of weights of 1."""
    _, method, _ = made(**{"method.uniform": 0.0})
    done = runs.run(tiny.spec({**SGD, "method.uniform": 0.0}, method="lesft"))
    runs.close_tensors(done.state.tensors, method.start().tensors)
    added, plain = (
        runs.run(tiny.spec({**SGD, **way}, method="lesft")).state.tensors
        for way in ({"method.uniform": 0.0, "method.add_nll": True}, {"method.uniform": 1.0})
    )
    runs.same_tensors(added, plain)


@pytest.mark.parametrize("ref_grad", ["detached", "through"])
def test_what_crosses_the_cut_is_the_formulas(ref_grad: str, monkeypatch: pytest.MonkeyPatch):
    """B (L_b + L_r) h 4 bytes up and 4 for each label; down B L_b h 4 if the weights are constants, else B (L_b + L_r) h 4."""
    problem, method, state = made(**{"method.ref_grad": ref_grad})
    leaves: list[list[bool]] = []
    arrived = SplitRound._serve

    def noted(self: SplitRound, smashed: list[torch.Tensor], *rest: Any) -> None:
        arrived(self, smashed, *rest)
        leaves.append([s.grad is not None and bool(s.grad.any()) for s in smashed])

    monkeypatch.setattr(SplitRound, "_serve", noted)
    update = method.local_update(runs.worker(problem), method.broadcast(state, 0, None), tasks(2))
    assert leaves == [[True, ref_grad == "through"]]  # dL/dS~ is exactly nothing if the weights are constants
    train = problem.inputs.train
    assert train.reference is not None
    assert update.cut_bytes is not None
    for k, task in enumerate(tasks(2)):
        base, reference = (int(data.lengths[task.rows[0]].max()) for data in (train, train.reference))
        up = 3 * (base + reference) * 32 * 4 + 3 * 4 * (base if ref_grad == "detached" else base + reference)
        down = 3 * 32 * 4 * (base if ref_grad == "detached" else base + reference)
        assert update.cut_bytes[:, k].tolist() == [up, down]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"method.gamma_sub_salient": 0.7}, "exceeds gamma_irrelevant=0.6"),
        ({"method.paths": "base", "method.uniform": 0.5}, "uniform must be null"),
        ({"data.loss_on": "all"}, "must be response"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], rule: str):
    with pytest.raises(UserError, match=rule):
        tiny.spec(settings, method="lesft")


def test_data_without_references_are_refused_before_any_work(tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' * 40)
    with pytest.raises(UserError, match="needs a reference solution for every example") as error:
        runs.problem(tiny.spec({"data.dataset": str(path), "data.partition.kind": "iid"}, method="lesft"))
    assert error.value.field == "data.columns.reference"
    runs.problem(
        tiny.spec({"data.dataset": str(path), "data.partition.kind": "iid", "method.uniform": 1.0}, method="lesft")
    )


def test_reference_alone_trains_on_the_reference_path():
    """Its activations alone cross the cut, and its loss is the plain one after prompts with their solutions."""
    problem, method, state = made(**{"method.paths": "reference"})
    update = method.local_update(runs.worker(problem), method.broadcast(state, 0, None), tasks(1))
    reference = problem.inputs.train.reference
    assert reference is not None
    assert update.cut_bytes is not None
    tokens = 3 * int(reference.lengths[:3].max())
    assert update.cut_bytes[:, 0].tolist() == [tokens * 4 * (32 + 1), tokens * 4 * 32]
