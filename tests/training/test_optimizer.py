"""One optimizer step over a stack of clients is torch's own step for each of them."""

from __future__ import annotations

import pytest
import torch

from fleetune.training.config import LocalConfig
from fleetune.training.optimizer import StackedAdamW, StackedSGD, clip_rows, make_optimizer

RATES = torch.tensor([[0.1], [0.01], [0.003]])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_row_is_torchs_adamw(weight_decay: float):
    """Three clients with learning rates of their own, ten steps; gradients from 1e-6 to 1e2, some zero."""
    params, rows = random(3, 8), []
    for k in range(3):
        leaf = params[k].clone().requires_grad_()
        rows.append((leaf, torch.optim.AdamW([leaf], lr=RATES[k].item(), weight_decay=weight_decay)))
    optimizer = StackedAdamW(params, RATES, weight_decay)
    scale = torch.tensor([0.0, 1e-6, 1e-4, 1e-2, 1.0, 1.0, 10.0, 100.0])
    for step in range(10):
        grads = random(3, 8, seed=1 + step) * scale
        for k, (leaf, torch_optimizer) in enumerate(rows):
            leaf.grad = grads[k].clone()
            torch_optimizer.step()
        optimizer.step(grads)
    for k, (leaf, _) in enumerate(rows):
        torch.testing.assert_close(params[k], leaf.detach(), rtol=1e-6, atol=1e-6)


def test_the_first_step_of_adamw_is_the_learning_rate():
    """Bias-corrected, m / sqrt(v) = g / |g|: a gradient of 5 moves by lr, whatever its size."""
    params = torch.zeros(2, 1)
    StackedAdamW(params, torch.tensor([[0.1], [0.2]]), 0.0).step(torch.tensor([[5.0], [-0.5]]))
    torch.testing.assert_close(params, torch.tensor([[-0.1], [0.2]]))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_clients_that_are_done_stay_as_they_are(kind: str):
    """Clients 0, 1, 2 take 3, 2 and 1 steps: each ends where it does in a stack of its own."""
    config = LocalConfig(optimizer=kind, weight_decay=0.1)
    params = random(3, 4)
    alone = [params[k : k + 1].clone() for k in range(3)]
    optimizers = [make_optimizer(config, alone[k], RATES[k : k + 1]) for k in range(3)]
    optimizer = make_optimizer(config, params, RATES)
    for step, num_active in enumerate((3, 2, 1)):
        grads = random(num_active, 4, seed=1 + step)
        for k in range(num_active):
            optimizers[k].step(grads[k : k + 1].clone())
        optimizer.step(grads)
    assert torch.equal(params, torch.cat(alone))


def test_sgd_in_numbers():
    """theta - lr g: 1 - 0.5 * 2 = 0 and 1 - 0.25 * 2 = 0.5."""
    params = torch.ones(2, 1)
    StackedSGD(params, torch.tensor([[0.5], [0.25]])).step(torch.tensor([[2.0], [2.0]]))
    assert params.tolist() == [[0.0], [0.5]]


def test_each_clients_gradient_is_clipped_by_its_own_norm():
    """Norms 5, 0.5 and 0 with a limit of 1: only the first is scaled, as torch does for that client alone."""
    grads = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    expected = []
    for row in grads:
        leaf = torch.zeros(2, requires_grad=True)
        leaf.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([leaf], 1.0)
        expected.append(leaf.grad)
    clip_rows(grads, 1.0)
    torch.testing.assert_close(grads, torch.stack(expected), rtol=0, atol=1e-7)
    torch.testing.assert_close(grads[0].norm(), torch.tensor(1.0))
    assert grads[1].tolist() == pytest.approx([0.3, 0.4])


def test_cosine_learning_rate():
    """From 1 to 0.2 over 4 rounds: 1, 0.2 + 0.4 (1 + cos 45°) = 0.883, 0.6, 0.317; constant stays."""
    config = LocalConfig(learning_rate=1.0, schedule="cosine", min_learning_rate=0.2)
    rates = [config.learning_rate_at(t, 4) for t in range(4)]
    assert rates == pytest.approx([1.0, 0.882843, 0.6, 0.317157], abs=1e-6)
    assert LocalConfig(learning_rate=0.3).learning_rate_at(3, 4) == 0.3


@pytest.mark.parametrize(
    ("epochs", "num_examples", "batches"),
    [
        (1, 20, [(8, 2), (4, 1)]),
        (1, 60, [(8, 7), (4, 1)]),
        (1, 64, [(8, 8)]),
        (1, 5, [(5, 1)]),
        (2, 20, [(8, 4), (4, 2)]),
        (0.5, 20, [(8, 1), (2, 1)]),
        (2.5, 20, [(8, 4), (4, 2), (8, 1), (2, 1)]),
        (0.01, 20, [(1, 1)]),
        (1.01, 20, [(8, 2), (4, 1)]),
    ],
)
def test_batches_of_a_client_in_epochs(epochs: float, num_examples: int, batches: list[tuple[int, int]]):
    """A pass is in batches of 8 and one of what is left; one in part has as many examples, rounded; one example at least."""
    assert LocalConfig(epochs=epochs, batch_size=8).batches(num_examples) == batches


def test_batches_of_a_client_in_steps_are_full():
    assert LocalConfig(steps=3, batch_size=8).batches(5) == [(8, 3)]
