"""Token weights of LESFT: equation (16) at values worked out by hand, the walk of the clusters, the means of equation (17)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fleetune.methods.token_weights import client_means, clusters, token_weights

GAMMAS = (5.0, 0.3, 0.6)


def weights(
    reference: list[float], sub: list[bool] | None = None, gammas: tuple[float, float, float] = GAMMAS
) -> Tensor:
    logs = torch.tensor(reference, dtype=torch.float64).log()
    return token_weights(logs, torch.tensor(sub or [False] * len(reference)), p_sal=0.95, gammas=gammas)


@pytest.mark.parametrize(
    ("reference", "sub", "expected"),
    [
        (0.96, False, 1.0003),  # 1 + 0.2^5
        (0.97, False, 1.0102),  # 1 + 0.4^5
        (0.98, False, 1.0778),  # 1 + 0.6^5
        (0.99, False, 1.3277),  # 1 + 0.8^5
        (1.0, False, 2.0),
        (1.0, True, 2.0),  # salient before sub-salient
        (0.5, True, 0.825),  # (0.5 / 0.95)^0.3
        (0.8, True, 0.950),
        (0.5, False, 0.680),  # (0.5 / 0.95)^0.6
        (0.8, False, 0.902),
        (0.0, False, 0.0),
    ],
)
def test_the_weight_of_a_token(reference: float, sub: bool, expected: float):
    assert weights([reference], [sub]).item() == pytest.approx(expected, abs=5e-4 if reference < 0.95 else 5e-5)


def test_all_three_are_one_at_the_threshold():
    """From either side of p_sal and in either class, S goes to 1."""
    close = weights([0.95 - 1e-9, 0.95 - 1e-9, 0.95, 0.95 + 1e-9], [True, False, False, False])
    torch.testing.assert_close(close, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-8)


def test_below_the_threshold_a_sub_salient_token_counts_more():
    grid = torch.linspace(0.01, 0.94, 50).tolist()
    assert (weights(grid, [True] * 50) > weights(grid, [False] * 50)).all()


@pytest.mark.parametrize("gammas", [GAMMAS, (0.5, 0.3, 0.6), (1.0, 1.0, 1.0)])
def test_gradients_are_finite_for_every_probability(gammas: tuple[float, float, float]):
    """Also where the model gives a token no chance at all, and at the threshold."""
    logs = torch.tensor([-200.0, -1e4, -0.05, -1e-9, 0.0], requires_grad=True)
    token_weights(logs, torch.tensor([True, False, True, False, False]), p_sal=0.95, gammas=gammas).sum().backward()
    assert logs.grad is not None
    assert torch.isfinite(logs.grad).all()


def angles(*degrees: float) -> Tensor:
    turned = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([turned.cos(), turned.sin()], dim=1)


def walk(features: Tensor, salient: set[int], mode: str = "similarity", owner: list[int] | None = None) -> list[int]:
    marks = torch.tensor([i in salient for i in range(len(features))])
    owners = torch.tensor(owner or [0] * len(features))
    return clusters(features, marks, owner=owners, mode=mode).nonzero().squeeze(1).tolist()  # type: ignore[arg-type]


def test_only_contiguous_neighbours_that_are_alike_join():
    """Token 3 is as the salient one, but token 2 between them is orthogonal."""
    assert walk(angles(0, 0, 90, 0), {0}) == [0, 1]


def test_the_centre_moves_with_each_token_that_joins():
    """cos 60 = 0.5 joins; the centre is then at 30 degrees, from which 90 is 60 away. From a centre at 0 it would be 90 away."""
    assert walk(angles(0, 60, 90), {0}) == [0, 1, 2]


def test_the_walk_to_the_right_goes_on_with_the_moved_centre():
    """Salient 1 at 0 degrees, left 0 at 60: the centre is at 30, so that -40 is 70 away (cos 0.34): it stays out."""
    assert walk(angles(60, 0, -40), {1}) == [0, 1]
    assert walk(angles(180, 0, -40), {1}) == [1, 2]  # nobody joins from the left: 40 away from the centre


def test_clusters_end_with_their_example():
    assert walk(angles(0, 0, 0, 0), {1}, owner=[0, 0, 1, 1]) == [0, 1]


def test_the_released_code_lets_unlike_tokens_join():
    """Its helper returns 1 - cos, above 0.4 for those that are not alike; after token 1 the centre is at 45 degrees, cos 0.71."""
    assert walk(angles(0, 90, 0), {0}, "nlft_code") == [0, 1]
    assert walk(angles(0, 10, 0), {0}, "nlft_code") == [0]
    assert walk(angles(0, 10, 0), {0}, "none") == [0]


def test_many_salient_tokens_walk_as_each_does_alone():
    """The walks start together and do not meet: the result is the union of what each one reaches."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 3, generator=generator)
    owner = [i // 20 for i in range(60)]
    salient = {0, 7, 8, 19, 20, 33, 41, 59}
    alone = sorted({i for each in salient for i in walk(features, {each}, owner=owner)})
    assert walk(features, salient, owner=owner) == alone
    assert len(alone) > len(salient)


def test_a_client_is_the_mean_of_its_examples_means():
    """Client 0: examples of tokens 1, 3 and 5; client 1: one of 2, 2, 8, and one that fills up its batch."""
    values = torch.tensor([1.0, 3.0, 5.0, 2.0, 2.0, 8.0])
    owner = torch.tensor([0, 0, 1, 2, 2, 2])
    assert client_means(values, owner, 4, 2, over="examples").tolist() == [3.5, 4.0]
    assert client_means(values, owner, 4, 2, over="tokens").tolist() == [3.0, 4.0]
