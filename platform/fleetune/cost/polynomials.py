"""Sizes as exact functions of a step's batch: found from two traced points, without fitting anything.

A step has B examples of S tokens, and M positions where the loss looks (summed over the examples). Every tensor of a step
has a number of elements that is a constant times one of a few forms (B S, M, B (S - 1), …), and so have the FLOPs of an
operator. The ratio of its values at two well-chosen points tells the form, and then the constant is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Point(NamedTuple):
    """The batch of one traced step."""

    batch_size: int
    num_tokens: int
    """Of each example."""
    num_logits: int
    """Positions where the loss looks, over all examples."""


BASIS = ("1", "B", "S", "B S", "B S^2", "M")
NUM = len(BASIS)
POINTS = (Point(3, 64, 97), Point(5, 112, 331))
FORMS: Mapping[str, tuple[int, ...]] = {
    "1": (1, 0, 0, 0, 0, 0),
    "B": (0, 1, 0, 0, 0, 0),
    "S": (0, 0, 1, 0, 0, 0),
    "S - 1": (-1, 0, 1, 0, 0, 0),
    "B S": (0, 0, 0, 1, 0, 0),
    "B (S - 1)": (0, -1, 0, 1, 0, 0),
    "B S^2": (0, 0, 0, 0, 1, 0),
    "M": (0, 0, 0, 0, 0, 1),
}


def monomials(batch_size: ArrayLike, num_tokens: ArrayLike, num_logits: ArrayLike) -> np.ndarray:
    """The basis at n batches, (n, 6)."""
    b, s, m = np.broadcast_arrays(*(np.asarray(x, float) for x in (batch_size, num_tokens, num_logits)))
    return np.stack([np.ones(b.shape), b, s, b * s, b * s * s, m], axis=-1)


def evaluate(polynomials: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Polynomials (…, 6) at n batches (n, 6) -> (n, …); every row is summed in the same order, whoever stands beside it."""
    shape = (len(basis),) + (1,) * (polynomials.ndim - 1)
    total = np.zeros((len(basis), *polynomials.shape[:-1]))
    for k in range(NUM):
        if polynomials[..., k].any():
            total += basis[:, k].reshape(shape) * polynomials[..., k]
    return total


class Fitter:
    """From a quantity's values at the two points to its polynomial."""

    def __init__(self, points: tuple[Point, Point] = POINTS):
        at = [[int(x) for x in monomials(*point)] for point in points]
        self.forms: list[tuple[np.ndarray, int, int]] = []
        for form in FORMS.values():
            first, second = (sum(c * x for c, x in zip(form, xs, strict=True)) for xs in at)
            self.forms.append((np.array(form, float), first, second))
        self._known: dict[tuple[int, int], np.ndarray] = {(0, 0): np.zeros(NUM)}

    def __call__(self, first: int, second: int) -> np.ndarray:
        """The polynomial (6,). ValueError where no form has these values."""
        key = (first, second)
        if key not in self._known:
            self._known[key] = self._fit(first, second)
        return self._known[key]

    def _fit(self, first: int, second: int) -> np.ndarray:
        for form, at_first, at_second in self.forms:
            if first * at_second == second * at_first and first % at_first == 0:
                return form * (first // at_first)
        raise ValueError(f"sizes {first} and {second} at {POINTS[0]} and {POINTS[1]} follow none of {', '.join(FORMS)}")
