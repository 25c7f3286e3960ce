"""The cost of one local step as exact functions of its batch: a step is traced once, and prices clients with any batch.

A polynomial, of FLOPs or of bytes, is an array (NUM,): the coefficients of `cost.polynomials.BASIS`. Memory has 7 parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.cost.polynomials import NUM, evaluate

# The parts of the memory: `cost.tracer` books every piece that is held under one of them.
PARTS = ("weights", "adapters", "gradients", "optimizer", "saved", "logits", "workspace")


@dataclass(frozen=True)
class SideWork:
    """One step's operators on one side, client or server.

    Operators with FLOPs stand one by one, because each has a roofline of its own: the longer of its computing and its moving.
    The others only move bytes, and so can be added up.
    """

    products: np.ndarray  # (p, 2, NUM): FLOPs and bytes of each distinct operator that computes
    counts: np.ndarray  # (p,): how often each runs in a step
    names: tuple[str, ...]  # (p,): torch's name of each
    moved: np.ndarray  # (NUM,): bytes that all other operators move in a step
    num_ops: int  # operators that move bytes, so kernels to launch

    @property
    def flops(self) -> np.ndarray:
        """FLOPs of a step, (NUM,)."""
        return (self.products[:, 0] * self.counts[:, None]).sum(0)

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        arrays = {name: getattr(self, name).tolist() for name in ("products", "counts", "moved")}
        return {**arrays, "names": list(self.names), "num_ops": self.num_ops}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SideWork:
        """The inverse."""
        products = np.array(values["products"], float).reshape(-1, 2, NUM)
        return cls(
            products, np.array(values["counts"], float), tuple(values["names"]), np.array(values["moved"], float),
            int(values["num_ops"]),
        )  # fmt: skip


@dataclass(frozen=True)
class StepTrace:
    """One kind of client's local step, traced from the code that carries it out."""

    client: SideWork
    server: SideWork  # what the server does for one client (split learning); empty for other methods
    moments: np.ndarray  # (m, 7, NUM): bytes by part at every moment that can be the peak, depending on the batch
    saved: np.ndarray  # (NUM,): bytes that autograd keeps of a step for its backward pass, beside weights and adapters
    cut: np.ndarray  # (2, NUM): bytes that a step sends to the server at the cut, and receives from it (split learning)
    upload: (
        np.ndarray
    )  # (2,): bytes that go up at the end whatever the number of steps, and bytes that go up for each step

    def peak(self, basis: np.ndarray) -> np.ndarray:
        """Bytes by part at the peak of a step, for n batches ``basis (n, NUM)`` -> (n, 7)."""
        where = evaluate(self.moments.sum(axis=1), basis).argmax(axis=1)  # (n,): when each batch needs most
        at_peak = self.moments[where]
        return sum((at_peak[:, :, k] * basis[:, k, None] for k in range(NUM)), np.zeros(at_peak.shape[:2]))

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        arrays = {name: getattr(self, name).tolist() for name in ("moments", "saved", "cut", "upload")}
        return {**arrays, "client": self.client.to_json(), "server": self.server.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepTrace:
        """The inverse."""
        return cls(
            client=SideWork.from_json(values["client"]),
            server=SideWork.from_json(values["server"]),
            moments=np.array(values["moments"], float).reshape(-1, len(PARTS), NUM),
            saved=np.array(values["saved"], float),
            cut=np.array(values["cut"], float).reshape(2, NUM),
            upload=np.array(values["upload"], float),
        )
