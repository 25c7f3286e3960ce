"""A method whose local work is nothing: what is left is what the engine itself costs.

Importing this module makes the method known. The workers import it when they receive a spec that holds its config, because the
directory of a script that starts Ray is on its workers' path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from fleetune.methods import METHODS
from fleetune.methods.base import GlobalModel, Method, MethodConfig, Payload, State
from fleetune.methods.traits import Traits
from fleetune.tensors import Stack
from fleetune.training.plan import ClientTask, CohortUpdate
from fleetune.training.worker import Worker

NUM_TENSORS = 16  # as many as LoRA on q and v of four layers has


class NoOpConfig(MethodConfig):
    """How large a state goes down to every client and comes back."""

    name: Literal["noop", "noop-batches"] = "noop"
    """noop-batches: every client's batches are drawn, priced and sent, as for real work, and then not looked at."""
    num_elements: int = 16384
    """fp32 numbers of the state: 16,384 are 64 KiB, the adapter of the LoRA workload."""

    @property
    def traits(self) -> Traits:
        """Nobody trains."""
        return Traits(draws_batches=self.name == "noop-batches", backward=False)


class NoOp(Method):
    """Sends a state to every client and gets it back untouched."""

    Config = NoOpConfig
    source = "benchmark"

    def start(self) -> State:
        """Zeros."""
        return State(
            {f"layers.{i}.state": torch.zeros(self.config.num_elements // NUM_TENSORS) for i in range(NUM_TENSORS)}
        )

    def evaluated(self, state: State, private: Any) -> GlobalModel:
        """The base model as it is."""
        return GlobalModel(self.context.whole_model, {})

    def deployed(self, state: State, private: Any) -> GlobalModel:
        """An untrained adapter."""
        return GlobalModel(self.context.whole_model, self.context.fresh_adapter())

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """What came, once per client: rows of a stack that are all the same memory."""
        n = len(tasks)
        one = Stack.of([payload.tensors])
        return CohortUpdate(Stack(one.shapes, one.data.expand(n, -1)), np.zeros(n), np.zeros(n, np.int64))


class NoOpBatches(NoOp):
    """The same with the batches of a real round."""


METHODS.update({"noop": NoOp, "noop-batches": NoOpBatches})
