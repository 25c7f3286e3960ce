"""C2A: clients train one small network that makes the adapters of all blocks, from the kinds of examples that a client has.

Kim et al. 2023, "Client-Customized Adaptation for Parameter-Efficient Federated Learning", Findings of ACL 2023, arXiv
2411.00311. The equations of the generated adapters are in `models.generated`; sizes and initial values are those of the authors'
code.

        client k      p_k = parts of its examples in each category             (never leaves the client)
                      trains the generator theta on its batches, with adapters h(theta; p_k, block, token); sends theta_k
        server        theta = sum_k p_k theta_k                                 (FedAvg, over the whole generator)
        evaluation    p = (1 / C, …, 1 / C)

What makes the adapters differ between clients is the input p_k alone; there is no personal parameter. The base model is frozen.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fleetune.data.batches import NO_EXAMPLE
from fleetune.methods.base import GlobalModel, Method, MethodConfig, Payload, PrivateStates, State
from fleetune.methods.traits import Traits
from fleetune.models.generated import HISTOGRAM
from fleetune.seeds import seed_of
from fleetune.tensors import Tensors
from fleetune.training.plan import ClientTask, LocalPlan

if TYPE_CHECKING:
    from fleetune.data.dataset import TokenizedDataset

FACTOR_STD = 0.01
"""Standard deviation of the fresh latent numbers and basis."""


class C2AConfig(MethodConfig):
    """Settings of C2A. They take the place of ``model.lora``'s rank; adapters stand after both halves of every block."""

    name: Literal["c2a"] = "c2a"
    units: int = Field(16, ge=1, le=4096)
    """Inner width r of the adapters."""
    code_size: int = Field(8, ge=1, le=256)
    """Numbers t of the code from which an adapter is made: it is a mixture of t fixed ones."""
    latent_size: int = Field(32, ge=1, le=4096)
    """Rank c of the factors in which these t adapters are stored."""

    @property
    def traits(self) -> Traits:
        """The generator has no ranks that a client could leave out."""
        return Traits(ranked=False)


class C2A(Method):
    """Server state: the generator, ``generator.…``."""

    Config = C2AConfig
    source: ClassVar[str] = "a shared network makes each client's adapters (Kim et al. 2023, arXiv 2411.00311)"

    def start(self) -> State:
        """A fresh generator. Its adapters are no identity: the untrained model is not quite the base model."""
        config, hidden = self.config, self.context.base.shape.hidden_size
        size, units, latent = config.code_size, config.units, config.latent_size
        blocks, categories = self.context.num_layers, self.context.num_categories
        # Name -> number of inputs; matrix and bias are drawn as those of PyTorch's linear layers.
        linear = {"by_label": categories, "by_token": hidden}
        tensors = {
            "latent": FACTOR_STD * self._normal("latent", size, units, latent),
            "basis": FACTOR_STD * self._normal("basis", latent, hidden),
            "shift": torch.zeros(units, hidden),
            "by_block": self._normal("by_block", blocks, size),
            **{name: self._uniform(name, num_in, size, num_in) for name, num_in in linear.items()},
            **{f"{name}_bias": self._uniform(f"{name}_bias", num_in, size) for name, num_in in linear.items()},
            "inner_bias": torch.zeros(units),
            "outer_bias": torch.zeros(hidden),
        }
        return State({f"generator.{name}": tensor for name, tensor in tensors.items()})

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """The adapters of somebody who has equally many examples of each category."""
        num_categories = self.context.num_categories
        uniform = torch.full((num_categories,), 1.0 / num_categories)
        return GlobalModel(self.context.whole_model, {**state.tensors, HISTOGRAM: uniform})

    def _normal(self, name: str, *size: int) -> Tensor:
        return torch.empty(size).normal_(generator=self._draws(name))

    def _uniform(self, name: str, num_in: int, *size: int) -> Tensor:
        bound = 1.0 / math.sqrt(num_in)
        return torch.empty(size).uniform_(-bound, bound, generator=self._draws(name))

    def _draws(self, name: str) -> torch.Generator:
        """The generator of random numbers for one tensor, so that a size of another changes nothing in it."""
        return torch.Generator().manual_seed(seed_of(self.context.seed, f"c2a {name}"))

    # -- client ---------------------------------------------------------------------------------------------------------
    def local_plan(self, payload: Payload) -> LocalPlan:
        """Train and send all but the client's histogram, which it makes itself."""
        num_categories = self.context.num_categories

        def own(task: ClientTask, data: TokenizedDataset) -> Tensors:
            return {HISTOGRAM: histogram(data.categories, task.rows, num_categories)}

        return replace(super().local_plan(payload), trainable=_is_sent, uploads=_is_sent, per_client=own)


def histogram(categories: np.ndarray, rows: np.ndarray, num_categories: int) -> Tensor:
    """Parts (C,) of each category among the examples ``rows`` (steps, batch) that a client works on in a round.

    ``categories``: (n,), of all training examples. An example that is drawn twice counts twice.
    """
    drawn = np.asarray(rows).reshape(-1)
    counts = np.bincount(categories[drawn[drawn != NO_EXAMPLE]], minlength=num_categories)
    return torch.from_numpy((counts / max(1, counts.sum())).astype(np.float32))


def _is_sent(name: str) -> bool:
    return name != HISTOGRAM
