"""Sizes as exact functions of a step's batch, found from two traced points; nothing is estimated.

A step has B examples of S tokens, and M positions where the loss looks (summed over the examples); examples have R tokens on
their reference path, if the method has one (`data.references`). Every tensor of a step has a number of elements that is a
constant times one of a few forms (B S, M, B (S - 1), …), and so have the FLOPs of an operator.
The points are chosen so that the ratio of a quantity's values at the two tells its form; the constant is then exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Point(NamedTuple):
    """The batch of one traced step."""

    batch_size: int
    num_tokens: int  # of each example
    num_logits: int  # positions where the loss looks, over all examples
    num_reference: int = 0  # of each example's reference path; 0: there is none


BASIS = ("1", "B", "S", "B S", "B S^2", "M", "R", "B R", "B R^2")
NUM = len(BASIS)
# Any two points will do at which no two forms have the same ratio.
POINTS = (Point(3, 64, 97, 80), Point(5, 112, 331, 168))
# Coefficients of `BASIS` of every form that a size or a count of FLOPs takes.
FORMS: Mapping[str, tuple[int, ...]] = {
    "1": (1, 0, 0, 0, 0, 0, 0, 0, 0),
    "B": (0, 1, 0, 0, 0, 0, 0, 0, 0),
    "S": (0, 0, 1, 0, 0, 0, 0, 0, 0),
    "S - 1": (-1, 0, 1, 0, 0, 0, 0, 0, 0),
    "B S": (0, 0, 0, 1, 0, 0, 0, 0, 0),
    "B (S - 1)": (0, -1, 0, 1, 0, 0, 0, 0, 0),
    "B S^2": (0, 0, 0, 0, 1, 0, 0, 0, 0),
    "M": (0, 0, 0, 0, 0, 1, 0, 0, 0),
    "R": (0, 0, 0, 0, 0, 0, 1, 0, 0),
    "R - 1": (-1, 0, 0, 0, 0, 0, 1, 0, 0),
    "B R": (0, 0, 0, 0, 0, 0, 0, 1, 0),
    "B (R - 1)": (0, -1, 0, 0, 0, 0, 0, 1, 0),
    "B R^2": (0, 0, 0, 0, 0, 0, 0, 0, 1),
}


def monomials(
    batch_size: ArrayLike, num_tokens: ArrayLike, num_logits: ArrayLike, num_reference: ArrayLike = 0
) -> np.ndarray:
    """The values of `BASIS` at n batches, scalars or (n,) each -> (n, NUM)."""
    sizes = (batch_size, num_tokens, num_logits, num_reference)
    b, s, m, r = np.broadcast_arrays(*(np.asarray(x, float) for x in sizes))
    return np.stack([np.ones(b.shape), b, s, b * s, b * s * s, m, r, b * r, b * r * r], axis=-1)


def evaluate(polynomials: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Polynomials (…, NUM) at n batches (n, NUM) -> (n, …).

    Term by term, not as a matrix product, whose order of summation depends on n: a client's costs must not change with the
    clients beside it.
    """
    shape = (len(basis),) + (1,) * (polynomials.ndim - 1)
    total = np.zeros((len(basis), *polynomials.shape[:-1]))
    for k in range(NUM):
        if polynomials[..., k].any():
            total += basis[:, k].reshape(shape) * polynomials[..., k]
    return total


class Fitter:
    """Finds a quantity's polynomial from its values at the two points."""

    def __init__(self, points: tuple[Point, Point] = POINTS):
        at = [[int(x) for x in monomials(*point)] for point in points]
        self.forms: list[tuple[np.ndarray, int, int]] = []  # coefficients (NUM,), values at the two points
        for form in FORMS.values():
            first, second = (sum(c * x for c, x in zip(form, xs, strict=True)) for xs in at)
            self.forms.append((np.array(form, float), first, second))
        self._found: dict[tuple[int, int], np.ndarray] = {(0, 0): np.zeros(NUM)}

    def __call__(self, first: int, second: int) -> np.ndarray:
        """The polynomial (NUM,) with these values. Raises ValueError if no form has them."""
        key = (first, second)
        if key not in self._found:
            self._found[key] = self._fit(first, second)
        return self._found[key]

    def _fit(self, first: int, second: int) -> np.ndarray:
        for form, at_first, at_second in self.forms:
            if (
                first * at_second == second * at_first and first % at_first == 0
            ):  # the form's ratio, and a whole constant
                return form * (first // at_first)
        raise ValueError(f"sizes {first} and {second} at {POINTS[0]} and {POINTS[1]} follow none of {', '.join(FORMS)}")
